"""Lanes and their slots: who may use which part of the region.

One forward pass holds one lane from its first call to its last, and one of its slots for each call in flight.
A slot is free again once the GPU side can no longer write into it and nobody here reads it any more; a lane once
its holder has left and all its slots are free. A cancelled pass leaves at once, but its slots come back with the
answers that are still on their way.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


class Slot:
    """One request area and its reply area, or, off shared memory, the right to one call in flight."""

    def __init__(self, index: int, lane: Lane) -> None:
        self.index = index
        self._lane = lane
        self._lent = False  # to the GPU side
        self._held = False  # by a call of ours

    def hold(self) -> None:
        self._held = True

    def lend(self) -> None:
        """A call about it is about to be sent."""
        self._lent = True

    def settle(self) -> None:
        """The call is answered, or its connection is gone."""
        self._lent = False
        self._return_if_free()

    def release(self) -> None:
        """We are done with it."""
        self._held = False
        self._return_if_free()

    def _return_if_free(self) -> None:
        if not self._lent and not self._held:
            self._lane.return_slot(self)


class Lane:
    """Some slots, held together."""

    def __init__(self, index: int, slots: int, free: asyncio.Queue[Lane]) -> None:
        self.index = index
        self._free_lanes = free
        self._count = slots
        self._free: asyncio.Queue[Slot] = asyncio.Queue()
        for slot in range(slots):
            self._free.put_nowait(Slot(slot, self))
        self._held = False

    @property
    def has_free_slot(self) -> bool:
        return not self._free.empty()

    async def slot(self) -> Slot:
        """The next free one; who waits here must hold none, or all could wait for each other."""
        slot = await self._free.get()
        slot.hold()
        return slot

    def return_slot(self, slot: Slot) -> None:
        self._free.put_nowait(slot)
        self._return_if_idle()

    def hold(self) -> None:
        self._held = True

    def release(self) -> None:
        self._held = False
        self._return_if_idle()

    def _return_if_idle(self) -> None:
        if not self._held and self._free.qsize() == self._count:
            self._free_lanes.put_nowait(self)


class Lanes:
    """All lanes of a connection; who finds none free waits in turn."""

    def __init__(self, count: int, slots: int) -> None:
        self._free: asyncio.Queue[Lane] = asyncio.Queue()
        for index in range(count):
            self._free.put_nowait(Lane(index, slots, self._free))

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
