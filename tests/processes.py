"""Real processes under test: the TEE side's command, its local GPU side, and what the OS says about them."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import psutil

ROOT = Path(__file__).parent.parent
RUN_S = 20  # what is expected to end and does not is interrupted
WARNING = "asynctsqp.tee: warning: "


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """Lines on standard error, without the warnings."""
        return [line for line in self.err.splitlines() if not line.startswith(WARNING)]


def assert_one_error(ended: Ended, code: int, *words: str, program: str = "asynctsqp.tee") -> None:
    """The contract of every error: one line that says what to do, an exit code, no traceback."""
    assert len(ended.errors) == 1, f"not one line of error, but {ended.errors}"
    assert ended.errors[0].startswith(f"{program}: error: "), ended.errors
    assert all(word in ended.errors[0] for word in words), ended.errors
    assert ended.code == code, ended


class TeeProcess:
    """`python -m asynctsqp.tee` as a user runs it; standard output unbuffered, so that its first byte is seen."""

    def __init__(self, *flags: str, stdin: int = subprocess.DEVNULL, **environment: str) -> None:
        command = [sys.executable, "-m", "asynctsqp.tee", *flags]
        pipe = subprocess.PIPE
        variables = os.environ | environment
        self.process = subprocess.Popen(command, stdin=stdin, stdout=pipe, stderr=pipe, cwd=ROOT, env=variables)

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_for_text(self) -> None:
        """Returns once the answer has begun: from then on the process is in the middle of a generation."""
        assert self.process.stdout is not None
        assert os.read(self.process.stdout.fileno(), 1), f"no text came: {self.end().err}"

    def local_gpu(self) -> psutil.Process:
        """The GPU side that it started."""
        return next(child for child in psutil.Process(self.pid).children() if "asynctsqp.gpu" in child.cmdline())

    def wait_for_local_gpu(self) -> int:
        """Its id, as soon as there is one: it does not listen yet."""
        found: list[int] = []

        def started() -> bool:
            try:
                found.append(self.local_gpu().pid)
            except StopIteration:
                return False
            return True

        assert wait_until(started, 20), "no GPU side was started"
        return found[0]

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self, timeout_s: float = 60) -> Ended:
        """Waits for it, with its standard input still open; it says less than a pipe holds."""
        self.process.wait(timeout_s)
        out, err = self.process.communicate()
        return Ended(self.process.returncode, out.decode(), err.decode())

    def close(self) -> None:
        """Whatever the test did: nothing stays."""
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def tee_process(*flags: str, stdin: int = subprocess.DEVNULL, **environment: str) -> Iterator[TeeProcess]:
    process = TeeProcess(*flags, stdin=stdin, **environment)
    try:
        yield process
    finally:
        process.close()


def run_main(main: Callable[[], int], *flags: str, stdin: str = "") -> Ended:
    """A command's main() in this process: what `python -m` runs, without three seconds of imports."""
    out, err = io.StringIO(), io.StringIO()
    watchdog = threading.Timer(RUN_S, os.kill, (os.getpid(), signal.SIGINT))
    watchdog.start()
    terminated = signal.getsignal(signal.SIGTERM)
    with (
        mock.patch.dict(os.environ),  # a command's own settings of OpenMP are not for the tests that follow
        mock.patch.object(sys, "argv", ["command", *flags]),
        mock.patch.object(sys, "stdin", io.StringIO(stdin)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            code = main()
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else 1
        finally:
            watchdog.cancel()
            signal.signal(signal.SIGTERM, terminated)
    return Ended(code, out.getvalue(), err.getvalue())


def run_tee(*flags: str, stdin: str = "") -> Ended:
    from asynctsqp.tee import main

    return run_main(main, *flags, stdin=stdin)


def run_gpu(*flags: str) -> Ended:
    from asynctsqp.gpu import main

    return run_main(main, *flags)


def wait_until(true: Callable[[], bool], timeout_s: float = 10) -> bool:
    """Polls; returns whether it became true."""
    give_up = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > give_up:
            return False
        time.sleep(0.02)
    return True


def gone(pid: int) -> bool:
    """Whether no live process has this id (a zombie is not alive)."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def shared_memory_names() -> list[str]:
    return [name for name in os.listdir("/dev/shm") if "asynctsqp" in name]


def mapped_regions(pid: int) -> int:
    """How many of our shared-memory regions a process has mapped."""
    return sum("/dev/shm/asynctsqp" in line for line in Path(f"/proc/{pid}/maps").read_text().splitlines())


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def until_idle(pid: int, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Until a process has used almost no time of a processor for half a second.

    meanwhile: what is done each half second; who reads nothing at all for five is taken for dead.
    """
    process, before = psutil.Process(pid), -1.0
    while (now := sum(process.cpu_times()[:2])) - before > 0.05:
        before = now
        time.sleep(0.5)
        meanwhile()
