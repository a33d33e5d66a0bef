"""`python -m asynctsqp.tee` as scripts use it: what goes to standard output, what to standard error."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from asynctsqp.command import _answer
from asynctsqp.config import EngineOptions
from tee_side.request import Piece, Progress
from tests.conftest import GpuProcess
from tests.processes import ROOT, WARNING, run_tee

FLAGS = ("--max-new-tokens", "12", "--temperature", "0", "--ignore-eos")
KEYS = {"text", "token_ids", "prompt_tokens", "completion_tokens", "finish_reason", "timing", "rpc", "config"}


@pytest.fixture
def tee(tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]) -> tuple[str, ...]:
    return ("--model", str(tiny_model("gqa")), "--gpu", tiny_gpu.endpoint, *FLAGS)


def test_json_is_one_object_with_the_documented_keys(tee: tuple[str, ...]) -> None:
    ended = run_tee(*tee, "--prompt", "Hello", "--json", "--lanes", "1", "--seed", "5", "--stop", "never comes")
    assert ended.code == 0
    result = json.loads(ended.out)
    assert set(result) == KEYS
    assert set(result["timing"]) == {"load_s", "prefill_s", "decode_s", "ms_per_token"}
    assert set(result["rpc"]) == {"calls", "bytes_sent", "bytes_received", "wait_s"}
    assert result["completion_tokens"] == len(result["token_ids"]) == 12
    assert result["finish_reason"] == "length"
    options = {"lanes": 1, "seed": 5, "temperature": 0, "protect": "none", "partition": "shielded", "transport": "auto"}
    assert options.items() <= result["config"].items()
    assert ended.err.startswith(WARNING)
    assert ended.errors == []


def test_one_token_is_one_forward_pass(tee: tuple[str, ...]) -> None:
    ended = run_tee(*tee, "--prompt", "Hello", "--json", "--lanes", "1", "--max-new-tokens", "1")
    assert json.loads(ended.out)["rpc"]["calls"] == 4 * 3 + 1


def test_the_prompt_may_come_from_anywhere(tee: tuple[str, ...], tmp_path: Path) -> None:
    text = "Œuvre d'art:\n東京の夜 🌃"
    (tmp_path / "prompt").write_text(text, "utf-8")
    ways = [
        run_tee(*tee, "--prompt", text),
        run_tee(*tee, "--prompt-file", str(tmp_path / "prompt")),
        run_tee(*tee, stdin=text),
    ]
    assert {way.code for way in ways} == {0}
    assert len({way.out for way in ways}) == 1


def test_the_streamed_text_is_the_answer(tee: tuple[str, ...]) -> None:
    as_json = json.loads(run_tee(*tee, "--prompt", "Hello", "--json").out)
    streamed = run_tee(*tee, "--prompt", "Hello")
    assert streamed.out == as_json["text"] + "\n"
    assert len(streamed.errors) == 3, "three lines of summary"
    assert "Hello" not in streamed.err


def test_chat_applies_the_template(tee: tuple[str, ...]) -> None:
    raw, chat = (json.loads(run_tee(*tee, "--prompt", "Hello", "--json", *flag).out) for flag in ((), ("--chat",)))
    assert chat["prompt_tokens"] > raw["prompt_tokens"]


@pytest.mark.parametrize("program", ["asynctsqp.tee", "asynctsqp.gpu"])
def test_help_names_every_flag_of_the_contract(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", program, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    contract = {
        "asynctsqp.tee": "model gpu prompt prompt-file chat max-new-tokens temperature top-p top-k seed stop "
        "ignore-eos "
        "partition transport compress protect weight-bits mask-memory mask-peer mask-peer-key lanes chunk-tokens "
        "slot-bytes kv-memory doorbell reconnect-s dtype threads shm-name enclave serve stats log-rpc trace json",
        "asynctsqp.gpu": "model bind device dtype threads",
    }
    missing = [flag for flag in contract[program].split() if f"--{flag}" not in done.stdout]
    assert not missing


def command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "asynctsqp.tee", *flags]


def test_a_reader_that_leaves_is_no_error(tee: tuple[str, ...]) -> None:
    pipe = subprocess.PIPE
    flags = ("--prompt", "Hello", "--max-new-tokens", "400")
    with subprocess.Popen(command(*tee, *flags), stdout=pipe, stderr=pipe, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        os.read(process.stdout.fileno(), 1)
        process.stdout.close()
        error = process.stderr.read().decode()
        assert process.wait(20) == 0
    assert "Traceback" not in error
    assert "Error" not in error


def test_an_output_that_cannot_be_written_is_told_in_one_line(tee: tuple[str, ...]) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            command(*tee, "--prompt", "Hello"), stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=60
        )
    lines = [line for line in done.stderr.splitlines() if not line.startswith(WARNING)]
    assert len(lines) == 1, lines
    assert done.returncode not in (0, 1)


def test_closed_standard_input_is_an_empty_prompt(tee: tuple[str, ...]) -> None:
    line = " ".join(command(*tee)) + " <&-"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    lines = [line for line in done.stderr.splitlines() if not line.startswith(WARNING)]
    assert len(lines) == 1, lines
    assert done.returncode == 2


def test_text_goes_out_in_utf8_whatever_the_locale(tee: tuple[str, ...]) -> None:
    """A script's locale is often C; an answer may hold any character."""
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    flags = ("--prompt", "Hello", "--temperature", "2", "--seed", "1", "--max-new-tokens", "100")
    done = subprocess.run(
        command(*tee, *flags), capture_output=True, cwd=ROOT, env=environment, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert not done.stdout.isascii(), "nothing was tested"
    done.stdout.decode("utf-8")


def test_an_answer_never_shows_on_standard_error(tee: tuple[str, ...]) -> None:
    secret = "correct horse battery staple"
    ended = run_tee(*tee, "--prompt", secret, "--slot-bytes", "4096")
    assert ended.code == 2
    assert not any(word in ended.err for word in secret.split())


class _Saying:
    """In the place of an engine: the GPU side has had a hand in what it answers."""

    options = EngineOptions()

    async def generate(self, prompt: str, progress: Progress, **sampling: Any) -> AsyncIterator[Piece]:
        progress.token_came(1.0)
        yield Piece("a\x1b]52;c;c2VjcmV0\x07b\tc\n\x9b2J", 1, "stop")


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("as_json", [True, False])
def test_an_answer_commands_no_terminal_and_is_whole_in_a_file(
    terminal: bool, as_json: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    asyncio.run(_answer(_Saying(), "Hello", {}, as_json=as_json))  # type: ignore[arg-type]
    out = capsys.readouterr().out
    assert ("\x9b" in out) is not terminal
    assert terminal is (not set(out) & {"\x1b", "\x07", "\x9b"})
    if not as_json:
        shown = "a\ufffd]52;c;c2VjcmV0\ufffdb\tc\n\ufffd2J" if terminal else "a\x1b]52;c;c2VjcmV0\x07b\tc\n\x9b2J"
        assert out == shown + "\n"
