"""How a command ends: with an exit code, and where something failed with one line on standard error."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator

from asynctsqp.errors import AsynctsqpError, BadInputError, one_line

INTERRUPTED = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def ended(program: str, work: Callable[[], None], failed: str) -> int:
    """Does the work of a command -> its exit code. failed: what an error of the operating system means here."""
    try:
        work()
        sys.stdout.flush()
    except AsynctsqpError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, asyncio.CancelledError):
        print(_said(program), file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read standard output has gone, as `| head` does
        _drop_output()
    except OSError as error:
        _drop_output()
        print(f"{program}: error: {failed}: {one_line(error.strerror or error)}", file=sys.stderr)
        return BadInputError.exit_code
    return 0


@contextlib.contextmanager
def at_once(close: Callable[[], int]) -> Iterator[None]:
    """For the time in which libraries are imported: SIGINT and SIGTERM end the process, with the code from `close`.

    KeyboardInterrupt would be raised within them, where it may be lost, be taken for a missing module, or crash an
    extension module that is being initialized. What the process ignores stays ignored, as in a shell's background.
    """

    def end(_number: int, _frame: object) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        os._exit(close())

    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupted(program: str) -> int:
    """Says so, past Python's buffers: they may be in the middle of a write. -> the exit code"""
    with contextlib.suppress(OSError):
        os.write(2, f"{_said(program)}\n".encode())
    return INTERRUPTED


def _said(program: str) -> str:
    return f"{program}: interrupted"


def _drop_output() -> None:
    """What is still buffered cannot be written: the flush at the end must not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
