"""Where pads come from; and the bank on an event loop: more of them made while nobody computes.

One thread makes pads. It fills the bank while no request runs, or at any time where there are cores to spare; a call
that finds too few waits for its own, the loop does not.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from asynctsqp.cores import cores
from asynctsqp.errors import AsynctsqpError
from asynctsqp.filling import Report, silent
from asynctsqp.integer_weights import Matrix
from asynctsqp.loop_thread import set_threads_of_this_thread
from tee_side.bank import Bank
from tee_side.masking import Pad

SPARE_CORES = 4  # so many cores are more than the two sides' own work keeps busy
PAUSE_S = 0.05  # between two looks at a full bank: a decode step takes from it a hundred times

Result = TypeVar("Result")


def cores_to_spare() -> bool:
    """Whether stocks are filled while requests run too, and not between them only."""
    return len(cores()) >= SPARE_CORES


class Pads(Protocol):
    """Where the masks of calls, and their products, come from."""

    @property
    def failure(self) -> AsynctsqpError | None:
        """What every call fails with from now on."""

    async def take(self, matrix: Matrix, rows: int) -> Pad:
        """Of one call."""

    async def prepare(self, tokens: int, report: Report = silent) -> int:
        """Waits until there are pads for so many tokens, or for as many as fit; returns how many there are."""

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """While a request is running."""

    async def close(self) -> None:
        """Ends what is made in the background."""


class BankPads:
    """Made by the enclave itself. Make it in a running loop."""

    failure: AsynctsqpError | None = None

    def __init__(self, bank: Bank, threads: int) -> None:
        """threads: to make them with."""
        self._bank = bank
        self._thread = ThreadPoolExecutor(1, "pads", set_threads_of_this_thread, (threads,))
        self._requests = 0
        self._beside = cores_to_spare()
        self._idle = asyncio.Event()
        self._idle.set()
        self._taken = asyncio.Event()
        self._filling = asyncio.create_task(self._fill())

    async def take(self, matrix: Matrix, rows: int) -> Pad:
        self._taken.set()
        ready = self._bank.take_ready(matrix, rows)
        return await self._run(lambda: self._bank.take(matrix, rows)) if ready is None else ready

    async def prepare(self, tokens: int, report: Report = silent) -> int:
        while self._bank.rows < tokens and await self._run(self._bank.fill_next):
            report("making masks", *self._bank.progress(tokens))
        return self._bank.rows

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        self._requests += 1
        if not self._beside:
            self._idle.clear()
        try:
            yield
        finally:
            self._requests -= 1
            if not self._requests:
                self._idle.set()

    async def close(self) -> None:
        self._filling.cancel()
        await asyncio.gather(self._filling, return_exceptions=True)
        await asyncio.to_thread(self._thread.shutdown)

    async def _fill(self) -> None:
        while True:
            await self._idle.wait()
            self._taken.clear()
            try:
                more = await self._run(self._bank.fill_next)
            except Exception:  # a file that cannot be read now, no memory: who needs the masks makes them, and hears it
                more = False
            if not more:
                await self._taken.wait()
                await asyncio.sleep(PAUSE_S)

    async def _run(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
