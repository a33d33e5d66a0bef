"""asynctsqp: LLaMA inference split between a CPU enclave and an untrusted GPU process.

The public names are loaded on first use: both sides import this package, and neither should load the other.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asynctsqp.engine import Alternative, Completion, Engine, Piece, TokenScore
    from asynctsqp.errors import (
        AsynctsqpError,
        BadInputError,
        EngineClosed,
        GpuSideError,
        IntegrityError,
    )

__version__ = "0.1.0"

__all__ = [
    "Alternative",
    "AsynctsqpError",
    "BadInputError",
    "Completion",
    "Engine",
    "EngineClosed",
    "GpuSideError",
    "IntegrityError",
    "Piece",
    "TokenScore",
]

_IN_ENGINE = {"Alternative", "Completion", "Engine", "Piece", "TokenScore"}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _IN_ENGINE and "asynctsqp.engine" not in sys.modules:
        from asynctsqp.cores import idle_threads_sleep
        from asynctsqp.memory import keep_freed

        keep_freed()
        with idle_threads_sleep():
            import_module("asynctsqp.engine")
    if name in __all__:
        return getattr(import_module("asynctsqp.engine" if name in _IN_ENGINE else "asynctsqp.errors"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
