"""A GPU side of one's own: a child process that ends with this one, however this one ends.

No torch here: a command starts it before it imports what takes seconds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from asynctsqp.config import EngineOptions
from asynctsqp.cores import default_threads
from asynctsqp.endpoints import local_endpoint
from asynctsqp.errors import BadInputError, EngineClosed, GpuSideUnreachable, one_line
from asynctsqp.printable import printable

STOP_S = 5.0
MOST_CHARACTERS = 4096  # of a line that it writes
PREFIX = "asynctsqp.gpu: error: "


class LocalGpuSide:
    """`python -m asynctsqp.gpu --local DIRECTORY`. All methods block: call them from a thread.

    The directory is made and removed here, and what the process writes is shortened and made printable: that it was
    started here makes it no more trusted than any other GPU side.
    """

    def __init__(self, model: str, options: EngineOptions) -> None:
        """options: of the engine that it is for: its threads, and which weights it makes as it starts."""
        self._command = [sys.executable, "-m", "asynctsqp.gpu", "--model", model]
        self._command += ["--threads", str(options.threads or default_threads())]
        if options.protect == "none":
            self._command += ["--dtype", options.dtype]
        else:
            self._command += ["--weight-bits", str(options.weight_bits)]
        self._process: subprocess.Popen[str] | None = None
        self._directory = ""
        self._listening = False
        self._last_words = ""
        self._stopped = False
        self._turn = threading.Lock()

    def start(self) -> None:
        """Begins its start, which takes seconds, and does not wait for it."""
        with self._turn:
            if self._process is None and not self._stopped:
                self._begin()

    def endpoint(self) -> str:
        """Starts the process if it is not running; returns where it listens.

        Raises BadInputError or GpuSideUnreachable with the process's own words if it does not come up.
        """
        with self._turn:
            if self._stopped:
                raise EngineClosed("the engine was closed while its GPU side started")
            if self._process is not None and self._listening and self._process.poll() is not None:
                self._end()
            process = self._process or self._begin()
            if not self._listening:
                self._await_listening(process)
            return local_endpoint(self._directory)

    def stop(self) -> None:
        """Ends it and removes what it may have left; also in the middle of its start. It cannot start again."""
        self._stopped = True
        starting = self._process
        if starting is not None:
            _make_end(starting)  # cuts a start short, which holds the lock
        with self._turn:
            self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        self._listening = False
        _make_end(process)
        if process.stdout:
            process.stdout.close()
        shutil.rmtree(self._directory, ignore_errors=True)  # it does this itself, unless it was killed

    def _begin(self) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        self._directory = tempfile.mkdtemp(prefix="asynctsqp-")
        # a process group of its own: Ctrl-C in a terminal is for us, and we close it in order
        process = self._process = subprocess.Popen(
            [*self._command, "--local", self._directory],
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            encoding="utf-8",
            errors="backslashreplace",
            process_group=0,
            env=_environment(),
        )
        self._listener = threading.Thread(target=self._listen, args=(process,), daemon=True)
        self._listener.start()
        return process

    def _await_listening(self, process: subprocess.Popen[str]) -> None:
        said = process.stdout.readline(MOST_CHARACTERS) if process.stdout else ""
        self._listening = said.startswith("listening ")
        if self._listening:
            return
        _wait(process)
        self._listener.join()
        self._end()
        error = BadInputError if process.returncode == BadInputError.exit_code else GpuSideUnreachable
        raise error(self._last_words or f"the local GPU side ended with code {process.returncode}")

    def _listen(self, process: subprocess.Popen[str]) -> None:
        """Passes its standard error on; its last line is kept, for the error that follows an early end."""
        if process.stderr is None:
            return
        with process.stderr:
            while line := process.stderr.readline(MOST_CHARACTERS):
                if line.startswith(PREFIX):
                    self._last_words = one_line(line.removeprefix(PREFIX))
                else:
                    sys.stderr.write(printable(line))


def _make_end(process: subprocess.Popen[str]) -> None:
    if process.stdin:
        process.stdin.close()
    process.terminate()  # which it hears before it listens to either
    _wait(process)


def _wait(process: subprocess.Popen[str]) -> None:
    """For an end that has begun, but not for long."""
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _environment() -> dict[str, str]:
    """Ours, with the packages found where this process found them."""
    here = str(Path(__file__).parent.parent)
    path = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": here + (os.pathsep + path if path else "")}
