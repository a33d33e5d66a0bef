"""A lane and its slots: who may use which part of the region.

One micro-batch at a time is on a lane, and each of its calls in flight on one of the lane's slots. A slot is free
again once the GPU side can no longer write into it and nobody here reads it any more. A cancelled batch leaves at
once, but its slots come back with the answers that are still on their way.
"""

from __future__ import annotations

import asyncio


class Lane:
    """Some slots, for one micro-batch after another."""

    def __init__(self, index: int, slots: int) -> None:
        self.index = index
        self._slots = slots
        self._free = [Slot(slot, self) for slot in reversed(range(slots))]
        self._permits = asyncio.Semaphore(slots)

    @property
    def idle(self) -> bool:
        """Whether no call is on its way, not even one that nobody waits for."""
        return len(self._free) == self._slots

    async def slot(self) -> Slot:
        """A free one, to be released; who waits here must hold none, or all could wait for each other."""
        await self._permits.acquire()
        slot = self._free.pop()
        slot.hold()
        return slot

    def put_back(self, slot: Slot) -> None:
        self._free.append(slot)
        self._permits.release()


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
        if not self._held:
            self._lane.put_back(self)

    def release(self) -> None:
        """We are done with it."""
        self._held = False
        if not self._lent:
            self._lane.put_back(self)
