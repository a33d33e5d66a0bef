"""The TEE side's command on a pseudo-terminal, as a person at a keyboard uses it."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.processes import ROOT

# By a program of its own, and not by `preexec_fn`: a process with threads should not run Python between fork and exec
TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; os.setsid(); "
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)
CODES = re.compile(rb"\x1b\[[0-9;?]*[a-zA-Z]|[\x01\x02]")
BEGUN_CODE = re.compile(rb"\x1b(\[[0-9;?]*)?\Z")  # a read may end within one
# and within what is styled: Ctrl-C makes the terminal drop output that nobody has read, so also half a code
BEGUN_STYLE = re.compile(rb"\x1b\[[1-9][0-9;]*m(?:(?!\x1b\[0?m).)*\Z", re.DOTALL)
CTRL_C, CTRL_D, UP = b"\x03", b"\x04", b"\x1b[A"
PROMPT = b"> "


class Terminal:
    """A session in which the command runs in the foreground: what is written is typed, Ctrl-C is a signal to all."""

    def __init__(self, *flags: str, output: Path | None = None, **environment: str) -> None:
        """output: a file that takes its standard output."""
        self._ours, theirs = pty.openpty()
        self._settings = termios.tcgetattr(self._ours)
        command = [sys.executable, "-c", TAKE_TERMINAL, sys.executable, "-m", "asynctsqp.tee", *flags]
        variables = os.environ | {"TERM": "xterm-256color"} | environment
        with (output or Path(os.devnull)).open("wb") as file:
            stdout = theirs if output is None else file
            self.process = subprocess.Popen(
                command, stdin=theirs, stdout=stdout, stderr=theirs, cwd=ROOT, env=variables
            )
        os.close(theirs)

    def type(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def read_until(self, mark: bytes) -> bytes:
        """What it shows from here on, without colours and the like, up to `mark` or to the end of it."""
        shown = b""
        while mark not in CODES.sub(b"", shown) or BEGUN_CODE.search(shown) or BEGUN_STYLE.search(shown):
            assert select.select([self._ours], [], [], 20)[0], f"the terminal shows only {shown!r}"
            try:
                shown += os.read(self._ours, 4096)
            except OSError:  # the other end is closed
                break
        return CODES.sub(b"", shown)

    def ask(self, line: bytes) -> bytes:
        """Types a line at the prompt that was read; what is shown between it and the next prompt."""
        self.type(line + b"\n")
        return self.read_until(b"\n" + PROMPT)

    def end(self, timeout_s: float = 10) -> tuple[int, bytes]:
        """Its exit code, and the rest of what it shows; the terminal is as it was."""
        code = self.process.wait(timeout_s)
        assert termios.tcgetattr(self._ours) == self._settings
        return code, self.read_until(b"nothing of the kind, to the end")

    def processes(self) -> list[psutil.Process]:
        """The command and the GPU side that it started."""
        return [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children()]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


@contextmanager
def terminal(*flags: str, output: Path | None = None, **environment: str) -> Iterator[Terminal]:
    opened = Terminal(*flags, output=output, **environment)
    try:
        yield opened
    finally:
        opened.close()
