"""A person at a terminal: lines that can be edited, text as it comes, and Ctrl-C.

Text is written as it is made, and wrapped by the terminal: unlike a live rendering it stays right in a narrow window,
when the window changes, and when it is longer than the window. Lines that were typed are prompts, and private: the
history that the arrow keys go through is in memory only.

Covered: control characters in an answer, which a GPU side may have a hand in, never reach the terminal.
Not covered: what the terminal itself keeps of what it shows.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
from collections.abc import Coroutine, Iterator
from types import FrameType
from typing import Any

from rich.console import Console

from asynctsqp.printable import printable

try:
    import readline  # from here on `input` edits lines and knows those before
except ImportError:  # a Python without it: lines are what the terminal makes of them
    readline = None  # type: ignore[assignment]

PROMPT = "> "
LOOK_S = 0.2  # how often a prompt that waits for a key looks for signals
STYLE_CODE = re.compile(r"(\x1b\[[0-9;]*m)")


class _Terminated(Exception):
    """SIGTERM came while a line was being typed."""


class Terminal:
    """Standard input and output. Answers go to standard output, all else to standard error."""

    def __init__(self) -> None:
        self._answers = Console()
        self._notes = Console(stderr=True)

    def note(self, text: str) -> None:
        """A line that is not the model's."""
        self._notes.out(text, style="dim", highlight=False)

    def write(self, text: str) -> None:
        """The next piece of an answer."""
        print(printable(text), end="", flush=True)

    def end_line(self) -> None:
        """Of an answer."""
        print(flush=True)

    def ask(self) -> str | None:
        """A line, or None at the end of the input (Ctrl-D). Ctrl-C takes a begun line back.

        Raises KeyboardInterrupt for a Ctrl-C where none is begun, and for SIGTERM. A running loop stands still
        meanwhile: signals can interrupt `input` in the main thread only, and the engine has a loop of its own.
        """
        while True:
            try:
                with _raising():
                    return self._input()
            except EOFError:
                self.note("")
                return None
            except KeyboardInterrupt:
                self.note("")
                if not _begun():
                    raise
            except _Terminated:
                self.note("")
                raise KeyboardInterrupt from None

    def _input(self) -> str:
        if self._answers.is_terminal:
            return input(self._prompt())
        self._notes.out(PROMPT, end="", highlight=False)
        return input()

    def _prompt(self) -> str:
        with self._answers.capture() as capture:
            self._answers.out(PROMPT, style="bold", end="", highlight=False)
        # readline counts columns: it must know what takes none
        return STYLE_CODE.sub("\x01\\1\x02", capture.get()) if readline else capture.get()


async def until_interrupted(work: Coroutine[Any, Any, None]) -> bool:
    """Runs `work`, which a Ctrl-C cancels, and only that. Returns whether there was one."""
    loop = asyncio.get_running_loop()
    task = asyncio.create_task(work)
    loop.add_signal_handler(signal.SIGINT, task.cancel)
    try:
        await asyncio.wait((task,))
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    if not task.cancelled():
        task.result()
    return task.cancelled()


def _begun() -> bool:
    """Whether the line that was being typed has anything on it."""
    return readline is not None and bool(readline.get_line_buffer())


@contextlib.contextmanager
def _raising() -> Iterator[None]:
    """SIGINT and SIGTERM raise where the program is, and the loop, which would act on them later, hears nothing.

    A signal that comes just before `input` waits for a key would only be seen at the next key: so a timer wakes it.
    """

    def terminate(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: terminate, signal.SIGALRM: _wake}
    wake_up = signal.set_wakeup_fd(-1)
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    signal.setitimer(signal.ITIMER_REAL, LOOK_S, LOOK_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wake_up)


def _wake(number: int, frame: FrameType | None) -> None:
    """Interrupts a wait, which is enough."""
