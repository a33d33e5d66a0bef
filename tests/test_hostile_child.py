"""A GPU side of one's own is a GPU side like any other: whatever it writes, or does not, harms nobody."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asynctsqp.config import EngineOptions
from asynctsqp.errors import AsynctsqpError, GpuSideUnreachable
from tee_side import local_gpu
from tee_side.local_gpu import LocalGpuSide
from tests.processes import wait_until

Start = Callable[[str], LocalGpuSide]
LISTENS = "sys.stdout.buffer.write(b'listening somewhere\\n'); sys.stdout.flush();"
STAYS = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
SOON_S = 0.3  # instead of STOP_S: a stand-in starts in no time


@pytest.fixture
def start(tmp_path: Path, private_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """start(code) -> a LocalGpuSide whose process runs that code instead."""
    monkeypatch.setattr(local_gpu, "STOP_S", SOON_S)
    started: list[LocalGpuSide] = []
    before = set(private_tmp.iterdir())

    def stand_in(code: str) -> LocalGpuSide:
        script = tmp_path / "python"
        script.write_text(f"#!{sys.executable} -S\nimport os, signal, sys, time\n{code}\n")
        script.chmod(0o700)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "executable", str(script))
            started.append(LocalGpuSide("a model", EngineOptions()))
        return started[-1]

    yield stand_in
    for local in started:
        local.stop()
    assert set(private_tmp.iterdir()) == before


def test_it_cannot_name_what_is_removed_when_it_ends(start: Start, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "work").write_text("of years")
    local = start(f"print('listening ipc://{precious}/gpu.sock', flush=True); {STAYS}")
    assert str(precious) not in local.endpoint()
    local.stop()
    assert (precious / "work").exists()


NO_GREETINGS = {
    "nothing": "sys.exit(1)",
    "bytes that are no text": "os.write(1, b'\\xff\\xfe listening\\n'); sys.exit(1)",
    "another word, and it stays": f"print('hello', flush=True); {STAYS}",
    "a line without end": "\nwhile True: os.write(1, b'x' * 65536)",
}


@pytest.mark.parametrize("name", NO_GREETINGS)
def test_one_that_does_not_say_that_it_listens_is_given_up(name: str, start: Start) -> None:
    with pytest.raises(GpuSideUnreachable, match="ended with code"):
        start(NO_GREETINGS[name]).endpoint()


def test_its_last_words_are_one_line_that_can_be_printed(start: Start) -> None:
    words = "'asynctsqp.gpu: error: ' + '\\x1b]0;a title\\x07' * 1000"
    with pytest.raises(GpuSideUnreachable) as caught:
        start(f"sys.stderr.write({words} + '\\n'); sys.exit(1)").endpoint()
    assert str(caught.value).isprintable()
    assert "a title" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_what_it_says_reaches_the_terminal_as_text(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    """All of it, so that it never waits for somebody to read: more than a pipe holds, in one line."""
    code = f"os.write(2, b'\\x1b[2J\\xff' + b'y' * 200_000 + b'\\nthe end\\n'); {LISTENS} {STAYS}"
    local = start(code)
    local.endpoint()
    said: list[str] = []

    def all_said() -> bool:
        said.append(capsys.readouterr().err)
        return "the end" in said[-1]

    assert wait_until(all_said)
    assert "".join(said) == "\ufffd[2J\\xff" + "y" * 200_000 + "\nthe end\n"


def test_one_that_will_not_end_is_killed_also_while_it_starts(start: Start) -> None:
    local = start(f"os.write(2, b'deaf\\n'); {STAYS}")
    failed: list[AsynctsqpError] = []

    def ask() -> None:
        try:
            local.endpoint()
        except AsynctsqpError as error:
            failed.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(SOON_S)  # it is deaf by now, or is ended by the signal: both are an end
    local.stop()
    asking.join(20)
    assert failed
