"""Lanes: who may use which slots of the region. One forward pass holds one lane from its first call to its last."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


class Lane:
    """Two slots of the region. Free again once its holder has left and no call on it is unanswered."""

    def __init__(self, index: int, free: asyncio.Queue[Lane]) -> None:
        self.index = index
        self._free = free
        self._held = False
        self._calls = 0

    def hold(self) -> None:
        self._held = True

    def release(self) -> None:
        self._held = False
        self._return_if_idle()

    def call_started(self) -> None:
        self._calls += 1

    def call_settled(self) -> None:
        self._calls -= 1
        self._return_if_idle()

    def _return_if_idle(self) -> None:
        # a cancelled pass leaves at once, but the GPU side may still write into its slots
        if not self._held and self._calls == 0:
            self._free.put_nowait(self)


class Lanes:
    """All lanes of a connection; who finds none free waits in turn."""

    def __init__(self, count: int) -> None:
        self._free: asyncio.Queue[Lane] = asyncio.Queue()
        for index in range(count):
            self._free.put_nowait(Lane(index, self._free))

    @property
    def free(self) -> int:
        return self._free.qsize()

    @contextlib.asynccontextmanager
    async def take(self) -> AsyncIterator[Lane]:
        lane = await self._free.get()
        lane.hold()
        try:
            yield lane
        finally:
            lane.release()
