"""A GPU side of one's own: a child process that ends with this one, however this one ends.

No torch here: a command starts it before it imports what takes seconds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

from asynctsqp.config import EngineOptions
from asynctsqp.cores import default_threads
from asynctsqp.errors import BadInputError, EngineClosed, GpuSideUnreachable

STOP_S = 5.0
PREFIX = "asynctsqp.gpu: error: "


class LocalGpuSide:
    """`python -m asynctsqp.gpu --local`. All methods block: call them from a thread."""

    def __init__(self, model: str, options: EngineOptions) -> None:
        """options: of the engine that it is for: its threads, and which weights it makes as it starts."""
        self._command = [sys.executable, "-m", "asynctsqp.gpu", "--local", "--model", model]
        self._command += ["--threads", str(options.threads or default_threads())]
        if options.protect == "none":
            self._command += ["--dtype", options.dtype]
        else:
            self._command += ["--weight-bits", str(options.weight_bits)]
        self._process: subprocess.Popen[str] | None = None
        self._endpoint = ""
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
            if self._process is not None and self._endpoint and self._process.poll() is not None:
                self._end()
            process = self._process or self._begin()
            if not self._endpoint:
                self._endpoint = self._await_listening(process)
            return self._endpoint

    def stop(self) -> None:
        """Ends it and removes what it may have left; also in the middle of its start. It cannot start again."""
        self._stopped = True
        starting = self._process
        if starting is not None:
            _ask_to_end(starting)  # cuts a start short, which holds the lock
        with self._turn:
            self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        endpoint, self._endpoint = self._endpoint, ""
        _ask_to_end(process)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout:
            process.stdout.close()
        if endpoint:  # it does this itself, unless it was killed
            shutil.rmtree(Path(endpoint.removeprefix("ipc://")).parent, ignore_errors=True)

    def _begin(self) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        # a process group of its own: Ctrl-C in a terminal is for us, and we close it in order
        process = self._process = subprocess.Popen(
            self._command,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            text=True,
            process_group=0,
            env=_environment(),
        )
        self._listener = threading.Thread(target=self._listen, args=(process,), daemon=True)
        self._listener.start()
        return process

    def _await_listening(self, process: subprocess.Popen[str]) -> str:
        word, _, endpoint = (process.stdout.readline() if process.stdout else "").strip().partition(" ")
        if word == "listening":
            return endpoint
        process.wait()
        self._listener.join()
        self._end()
        error = BadInputError if process.returncode == BadInputError.exit_code else GpuSideUnreachable
        raise error(self._last_words or f"the local GPU side ended with code {process.returncode}")

    def _listen(self, process: subprocess.Popen[str]) -> None:
        """Passes its standard error on; its last line is kept, for the error that follows an early end."""
        if process.stderr is None:
            return
        with process.stderr:
            for line in process.stderr:
                if line.startswith(PREFIX):
                    self._last_words = line.removeprefix(PREFIX).strip()
                else:
                    sys.stderr.write(line)


def _ask_to_end(process: subprocess.Popen[str]) -> None:
    if process.stdin:
        process.stdin.close()
    process.terminate()  # which it hears before it listens to either


def _environment() -> dict[str, str]:
    """Ours, with the packages found where this process found them."""
    here = str(Path(__file__).parent.parent)
    path = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": here + (os.pathsep + path if path else "")}
