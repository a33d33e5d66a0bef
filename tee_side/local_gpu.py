"""A GPU side of one's own: a child process that ends with this one, however this one ends.

No torch here: a command starts it before it imports what takes seconds.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, cast

from asynctsqp.config import EngineOptions
from asynctsqp.cores import default_threads
from asynctsqp.endpoints import local_endpoint
from asynctsqp.errors import AsynctsqpError, BadInputError, EngineClosed, GpuSideUnreachable, one_line
from asynctsqp.limits import MOST_LOADING_S
from asynctsqp.printable import printable

STOP_S = 5.0
MOST_CHARACTERS = 4096  # of a line that it writes
PREFIX = "asynctsqp.gpu: error: "


class LocalGpuSide:
    """`python -m asynctsqp.gpu --local DIRECTORY`. All methods block: call them from a thread.

    That it is started here makes it no more trusted than any other GPU side: the directory is made and removed here,
    what it writes is shortened and made printable, and nothing is waited for without end.
    """

    def __init__(self, model: str, options: EngineOptions) -> None:
        """options: of the engine that it is for: its threads, and which weights it makes as it starts."""
        self._command = [sys.executable, "-m", "asynctsqp.gpu", "--model", model]
        self._command += ["--threads", str(options.threads or default_threads())]
        if options.protect == "none":
            self._command += ["--dtype", options.dtype]
        else:
            self._command += ["--weight-bits", str(options.weight_bits)]
        self._child: _Child | None = None
        self._stopped = False
        self._turn = threading.Lock()

    def start(self) -> None:
        """Begins its start, which takes seconds, and does not wait for it. Raises GpuSideUnreachable if it cannot."""
        with self._turn:
            if self._child is None and not self._stopped:
                self._child = _Child(self._command)

    def endpoint(self) -> str:
        """Starts the process if it is not running; returns where it listens.

        Raises BadInputError or GpuSideUnreachable with the process's own words if it does not come up.
        """
        with self._turn:
            self._check_wanted()
            if self._child is not None and self._child.has_ended:
                self._child.end()
                self._child = None
            child = self._child = self._child or _Child(self._command)
        if child.comes_up(MOST_LOADING_S):
            return child.endpoint
        child.end()
        with self._turn:
            if self._child is child:
                self._child = None
            self._check_wanted()
        raise child.failure()

    def stop(self) -> None:
        """Ends it and removes what it may have left; also in the middle of its start. It cannot start again."""
        with self._turn:
            self._stopped = True
            child, self._child = self._child, None
        if child is not None:
            child.end()

    def _check_wanted(self) -> None:
        if self._stopped:
            raise EngineClosed("the engine was closed while its GPU side started")


class _Child:
    """One process. Two threads read what it writes: none of ours waits for it, and it waits for none."""

    def __init__(self, command: list[str]) -> None:
        self._directory = tempfile.mkdtemp(prefix="asynctsqp-")
        self.endpoint = local_endpoint(self._directory)
        self._listens = False
        self._last_words = ""
        self._settled = threading.Event()  # it listens, or never will
        try:
            self._process = self._begin([*command, "--local", self._directory])
        except OSError as error:
            shutil.rmtree(self._directory)
            raise GpuSideUnreachable(f"a local GPU side cannot be started: {one_line(error)}") from None
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._greeted, self._pass_on)]
        for reader in self._readers:
            reader.start()

    @property
    def has_ended(self) -> bool:
        """Of one that has come up."""
        return self._listens and self._process.poll() is not None

    def comes_up(self, limit_s: float) -> bool:
        """Waits until it is known whether it does."""
        self._settled.wait(limit_s)
        return self._listens

    def end(self) -> None:
        """May be called again, and by several threads."""
        if self._settled.is_set() and not self._listens:
            self._wait()  # it ends by itself, with a code that says why
        with contextlib.suppress(OSError):
            self._input.close()
        self._process.terminate()  # which it hears before it listens to either
        if not self._wait():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # what it may have started, too
            self._process.wait()
        self._settled.set()
        for reader in self._readers:
            reader.join(STOP_S)
        shutil.rmtree(self._directory, ignore_errors=True)  # it does this itself, unless it was killed

    def failure(self) -> AsynctsqpError:
        """Of one that has ended without coming up."""
        code = self._process.returncode
        error = BadInputError if code == BadInputError.exit_code else GpuSideUnreachable
        return error(self._last_words or f"the local GPU side ended with code {code}")

    def _begin(self, command: list[str]) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        # a process group of its own: Ctrl-C in a terminal is for us, and we close it in order
        process = subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            encoding="utf-8",
            errors="backslashreplace",
            process_group=0,
            env=_environment(),
        )
        self._input, self._output, self._errors = (
            cast(IO[str], pipe) for pipe in (process.stdin, process.stdout, process.stderr)
        )
        return process

    def _wait(self) -> bool:
        """Whether it ends in time."""
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _greeted(self) -> None:
        with self._output as output:
            self._listens = output.readline(MOST_CHARACTERS).startswith("listening ")
            self._settled.set()
            while output.read(MOST_CHARACTERS):  # it has nothing more to say, and is not to wait if it does
                pass

    def _pass_on(self) -> None:
        """Its last words are kept: for the error, if it does not come up, and shown at its end if it had."""
        with self._errors as errors:
            while line := errors.readline(MOST_CHARACTERS):
                if line.startswith(PREFIX):
                    self._last_words = one_line(line.removeprefix(PREFIX))
                else:
                    sys.stderr.write(printable(line))
        self._settled.wait()
        if self._listens and self._last_words:
            sys.stderr.write(f"{PREFIX}{self._last_words}\n")


def _environment() -> dict[str, str]:
    """Ours, with the packages found where this process found them."""
    here = str(Path(__file__).parent.parent)
    path = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": here + (os.pathsep + path if path else "")}
