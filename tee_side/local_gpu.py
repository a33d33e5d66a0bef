"""A GPU side of one's own: a child process that ends with this one, however this one ends."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from asynctsqp.errors import BadInputError, EngineClosed, GpuSideUnreachable

STOP_S = 5.0
PREFIX = "asynctsqp.gpu: error: "


class LocalGpuSide:
    """`python -m asynctsqp.gpu --local`. All methods block: call them from a thread."""

    def __init__(self, model: str, weights: Sequence[str], threads: int) -> None:
        """weights: the flags that say which it makes as it starts."""
        self._command = [sys.executable, "-m", "asynctsqp.gpu", "--local", "--model", model]
        self._command += ["--threads", str(threads), *weights]
        self._process: subprocess.Popen[str] | None = None
        self._endpoint = ""
        self._last_words = ""
        self._stopped = False
        self._turn = threading.Lock()

    def endpoint(self) -> str:
        """Starts the process if it is not running; returns where it listens.

        Raises BadInputError or GpuSideUnreachable with the process's own words if it does not come up.
        """
        with self._turn:
            if self._stopped:
                raise EngineClosed("the engine was closed while its GPU side started")
            if self._process is None or self._process.poll() is not None:
                self._end()
                self._start()
            return self._endpoint

    def stop(self) -> None:
        """Ends it and removes what it may have left; also in the middle of its start. It cannot start again."""
        self._stopped = True
        starting = self._process
        if starting is not None and starting.stdin:
            starting.stdin.close()  # cuts a start short, which holds the lock
        with self._turn:
            self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin:
            process.stdin.close()  # asks it to end
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout:
            process.stdout.close()
        if self._endpoint:  # it does this itself, unless it was killed
            shutil.rmtree(Path(self._endpoint.removeprefix("ipc://")).parent, ignore_errors=True)

    def _start(self) -> None:
        pipe = subprocess.PIPE
        # a process group of its own: Ctrl-C in a terminal is for us, and we close it in order
        process = subprocess.Popen(
            self._command,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            text=True,
            process_group=0,
            env=_environment(),
        )
        self._process = process
        listener = threading.Thread(target=self._listen, args=(process,), daemon=True)
        listener.start()
        word, _, self._endpoint = (process.stdout.readline() if process.stdout else "").strip().partition(" ")
        if word != "listening":
            process.wait()
            listener.join()
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


def _environment() -> dict[str, str]:
    """Ours, with the packages found where this process found them."""
    here = str(Path(__file__).parent.parent)
    path = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": here + (os.pathsep + path if path else "")}
