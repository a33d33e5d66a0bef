"""A lane and its slots: who may use which part of the region.

One micro-batch at a time is on a lane, and each of its calls in flight on one of the lane's slots. A slot is free
again once the GPU side can no longer write into it and nobody here reads it any more. A cancelled batch leaves at
once, but its slots come back with the answers that are still on their way.
"""

from __future__ import annotations

import asyncio


class Slot:
    """One request area and its reply area, or, off shared memory, the right to one call in flight."""

    def __init__(self, index: int, free: asyncio.Queue[Slot]) -> None:
        self.index = index
        self._free = free
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
            self._free.put_nowait(self)


class Lane:
    """Some slots, for one micro-batch after another."""

    def __init__(self, index: int, slots: int) -> None:
        self.index = index
        self._slots = slots
        self._free: asyncio.Queue[Slot] = asyncio.Queue()
        for slot in range(slots):
            self._free.put_nowait(Slot(slot, self._free))

    @property
    def has_free_slot(self) -> bool:
        return not self._free.empty()

    @property
    def idle(self) -> bool:
        """Whether no call is on its way, not even one that nobody waits for."""
        return self._free.qsize() == self._slots

    async def slot(self) -> Slot:
        """The next free one; who waits here must hold none, or all could wait for each other."""
        slot = await self._free.get()
        slot.hold()
        return slot
