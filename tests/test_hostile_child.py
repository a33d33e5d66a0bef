"""A GPU side of one's own is a GPU side like any other: whatever it writes, or does not, harms nobody."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest

from asynctsqp.config import EngineOptions
from asynctsqp.errors import EngineClosed, GpuSideUnreachable
from tee_side import local_gpu
from tee_side.local_gpu import LocalGpuSide
from tests.processes import gone, wait_until

Start = Callable[[str], LocalGpuSide]
LISTENS = "sys.stdout.buffer.write(b'listening somewhere\\n'); sys.stdout.flush();"
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
STAYS = f"{DEAF}; time.sleep(600)"
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
    "nothing, and it stays": STAYS,
    "nothing, and its child stays": "\nif os.fork(): sys.exit(1)\nos.close(0); time.sleep(3)",
}


@pytest.mark.parametrize("name", NO_GREETINGS)
def test_one_that_does_not_say_that_it_listens_is_given_up(
    name: str, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_gpu, "MOST_LOADING_S", 1.0)
    with pytest.raises(GpuSideUnreachable, match="ended with code"):
        start(NO_GREETINGS[name]).endpoint()


def test_its_last_words_are_one_line_that_can_be_printed(start: Start) -> None:
    words = "'asynctsqp.gpu: error: ' + '\\x1b]0;a title\\x07' * 1000"
    with pytest.raises(GpuSideUnreachable) as caught:
        start(f"sys.stderr.write({words} + '\\n'); sys.exit(1)").endpoint()
    assert str(caught.value).isprintable()
    assert "a title" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_what_it_says_reaches_the_terminal_as_text(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, so that it never waits for somebody to read: more than a pipe holds, in one line."""
    said: list[str] = []
    monkeypatch.setattr(sys, "stderr", mock.Mock(write=said.append))
    local = start(f"os.write(2, b'\\x1b[2J\\xff' + b'y' * 200_000 + b'\\nthe end\\n'); {LISTENS} {STAYS}")
    local.endpoint()
    assert wait_until(lambda: "".join(said).endswith("the end\n"))
    assert "".join(said) == "\ufffd[2J\\xff" + "y" * 200_000 + "\nthe end\n"


def test_one_that_will_not_end_is_killed_also_while_it_starts(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so is what it has started. Whoever waits for it is told that the engine was closed."""
    said: list[str] = []
    monkeypatch.setattr(sys, "stderr", mock.Mock(write=said.append))
    local = start(f"{DEAF}; os.fork(); os.write(2, b'%d deaf\\n' % os.getpid()); time.sleep(600)")
    with ThreadPoolExecutor(1) as asking:
        asked = asking.submit(local.endpoint)
        assert wait_until(lambda: "".join(said).count("deaf") == 2)
        local.stop()
        with pytest.raises(EngineClosed):
            asked.result(20)
    for line in "".join(said).splitlines():
        assert gone(int(line.removesuffix(" deaf")))


def test_one_that_is_being_started_is_stopped_too(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """`stop` comes while the process is made, which takes a while on a busy machine."""
    local, making = start(STAYS), threading.Event()
    begin = local_gpu._Child._begin

    def slow(child: Any, command: list[str]) -> Any:
        making.set()
        time.sleep(0.3)
        return begin(child, command)

    monkeypatch.setattr(local_gpu._Child, "_begin", slow)
    with ThreadPoolExecutor(1) as asking:
        asked = asking.submit(local.endpoint)
        assert making.wait(10)
        local.stop()
        with pytest.raises(EngineClosed):
            asked.result(20)


def test_one_that_cannot_be_started_leaves_nothing(start: Start, tmp_path: Path) -> None:
    local = start("")
    (tmp_path / "python").unlink()
    with pytest.raises(GpuSideUnreachable, match="cannot be started"):
        local.endpoint()


def test_the_words_of_one_are_not_the_next_ones(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it says as it is lost, while it listens, is shown; the one after it ends without a word."""
    words = "sys.stderr.write('asynctsqp.gpu: error: the device is lost\\n')"
    once = f"\nif not os.path.exists({str(tmp_path / 'once')!r}):\n open({str(tmp_path / 'once')!r}, 'w'); "
    local = start(f"{once}{LISTENS} {words}; sys.exit(1)\nsys.exit(1)")
    local.endpoint()
    assert wait_until(lambda: any(child.status() == psutil.STATUS_ZOMBIE for child in psutil.Process().children()))
    with pytest.raises(GpuSideUnreachable, match="ended with code 1"):
        local.endpoint()
    assert "the device is lost" in capsys.readouterr().err
