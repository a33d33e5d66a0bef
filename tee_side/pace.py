"""What is long on the event loop, one at a time, and in between what is short.

Lanes whose answers are here have a norm or an activation to compute, tens of microseconds, before the GPU side has
their next product to do. If they queued behind the attention of all other lanes, that would stand still meanwhile, and
then all of them would wait for it: both sides would work in turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator

from asynctsqp.doorbell import LOOKS

PIECE_S = 0.0005  # that others' short work waits, more or less, if nobody can tell that there is any
TURNS = 3  # of the loop: whoever reads an answer that is here may be behind us, and then it is its lane's turn


class Pace:
    """Of one engine. answered: whether an answer is known to have come that nobody has read."""

    def __init__(self, answered: Callable[[], bool]) -> None:
        self._answered = answered
        self._passes = 0
        self._long = asyncio.Lock()
        self._since = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """While a forward pass runs. A single one waits for nobody."""
        self._passes += 1
        try:
            yield
        finally:
            self._passes -= 1

    @contextlib.asynccontextmanager
    async def long(self) -> AsyncIterator[None]:
        """For work that takes longer than what others have to do in between. First come first served."""
        async with self._long:
            await self.let_others()
            yield

    @property
    def looks(self) -> int:
        """As Doorbell wants it: whoever attends is not to wait for our polling."""
        return 1 if self._long.locked() else LOOKS

    @property
    def is_alone(self) -> bool:
        """Whether a single pass runs."""
        return self._passes <= 1

    async def breathe(self) -> None:
        """Between two pieces of what is long: gives others a turn if they need one."""
        if not self.is_alone and (self._answered() or time.perf_counter() - self._since > PIECE_S):
            await self.let_others()

    async def let_others(self) -> None:
        if not self.is_alone:
            for _ in range(TURNS):
                await asyncio.sleep(0)
            self._since = time.perf_counter()
