"""A worker's end of the pipe: commands in, results out, one JSON line each (benchmarks.harness is the other end)."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

Command = Callable[..., dict[str, Any]]

PR_SET_PDEATHSIG = 1


def serve(commands: Mapping[str, Command]) -> None:
    """Runs commands by name until standard input ends. An exception of one is its reply, in one line."""
    die_with_parent()
    # Our own copy of standard output: whatever else writes there (a library's banner) goes to standard error.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as replies:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        for line in sys.stdin:
            request = json.loads(line)
            print(json.dumps(_reply(commands[request["command"]], request["arguments"])), file=replies, flush=True)


def _reply(command: Command, arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"result": command(**arguments)}
    except Exception as error:  # whatever it is, the benchmark that asked must hear of it
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())}


def die_with_parent() -> None:
    """A benchmark that is killed must not leave a stopped worker behind, which would see no end of its input."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
