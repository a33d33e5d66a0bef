"""The settings of benchmarks.sweep, and which of them an engine would choose by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from asynctsqp import doorbell
from asynctsqp.checkpoint import Checkpoint
from asynctsqp.config import EngineOptions, make
from asynctsqp.cores import cores, default_threads
from asynctsqp.layouts import Layouts
from asynctsqp.tensor_codec import WIRE_DTYPES
from benchmarks.cli import engine_options
from tee_side.room import Room, policy

AUTOMATIC = "automatic"
LANES = ("lanes=1", "lanes=2", "lanes=4")
CHUNKS = ("chunk_tokens=256", "chunk_tokens=512", "chunk_tokens=1024")
BOTH = ("lanes=2 chunk_tokens=512", "lanes=4 chunk_tokens=256")  # lanes help a prompt of several chunks
DOORBELL = ("doorbell=off", "doorbell=on")


def settings() -> tuple[str, ...]:
    """All explicit ones, on this machine, in the words of --engine."""
    threads = (f"threads={count}" for count in (1, len(cores())))
    return tuple(dict.fromkeys([*LANES, *CHUNKS, *BOTH, *DOORBELL, *threads]))


def options_of(name: str) -> dict[str, Any]:
    """Engine's keywords and values."""
    return engine_options([] if name == AUTOMATIC else name.split())


def unlike_automatic(checkpoint: Checkpoint, dtype: str) -> Iterator[str]:
    """The explicit settings of which an engine makes something else than of none."""
    same = _made_of(AUTOMATIC, checkpoint, dtype)
    return (name for name in settings() if _made_of(name, checkpoint, dtype) != same)


def _made_of(name: str, checkpoint: Checkpoint, dtype: str) -> tuple[Any, ...]:
    """What decides how an engine runs, by the functions that the engine asks; its GPU side is on the CPU here."""
    options = make(EngineOptions, options_of(name) | {"dtype": dtype})
    room = Room.of(checkpoint.spec, Layouts(checkpoint.spec, WIRE_DTYPES[dtype]), options, "cpu")
    bell = options.doorbell != "off" and doorbell.supported()
    return room, policy(options, room, "cpu", "doorbell"), bell, options.threads or default_threads()
