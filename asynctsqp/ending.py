"""How a command ends: with an exit code, and where something failed with one line on standard error."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable

from asynctsqp.errors import AsynctsqpError, BadInputError

INTERRUPTED = 130


def ended(program: str, work: Callable[[], None], failed: str) -> int:
    """Does the work of a command -> its exit code. failed: what an error of the operating system means here."""
    try:
        work()
        sys.stdout.flush()
    except AsynctsqpError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, asyncio.CancelledError):
        print(f"{program}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read standard output has gone, as `| head` does
        _drop_output()
    except OSError as error:
        _drop_output()
        print(f"{program}: error: {failed}: {error.strerror}", file=sys.stderr)
        return BadInputError.exit_code
    return 0


def _drop_output() -> None:
    """What is still buffered cannot be written: the flush at the end must not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
