"""The low-latency way for a call and its answer: encoded messages in two rings in shared memory.

One ring a direction, one producer and one consumer each:

    | head | parked | entry 0: length, message | entry 1 | ... |      head = messages ever pushed

The producer writes the entry, then `head`. The consumer polls `head`, letting other coroutines run between two
looks, for as long as the next message may be near; then it sets `parked`, looks once more, and sleeps. A producer
that finds `parked` set clears it and sends an empty Wake over ZeroMQ. A wake-up cannot be lost: each side writes
its own word, passes a fence, and then reads the other's, so at least one of the two sees the other; and the sleep
is finite all the same.

The entries hold the same messages as ZeroMQ frames do. An entry is copied whole, once, and only the copy is looked at,
its length included. The count of consumed messages is the consumer's own: nothing that the other side writes is used as
an index or a size unchecked. All reads and writes are of whole 8-byte words on their boundaries, as an enclave must
access memory outside (Intel's advisories SA-00657 for reads and SA-00615 for writes).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import threading
import time
from collections.abc import Callable

from asynctsqp.errors import ProtocolError
from asynctsqp.limits import MAX_LANES, MAX_SLOTS

ENTRIES = MAX_LANES * MAX_SLOTS  # every slot may have one call in flight
ENTRY_BYTES = 256
WORD_BYTES = 8
MAX_MESSAGE_BYTES = ENTRY_BYTES - WORD_BYTES
WORDS_BYTES = 128
RING_BYTES = WORDS_BYTES + ENTRIES * ENTRY_BYTES

SPIN_S = 0.01  # longer than a decode step's longest product or pause, shorter than anyone's patience
LOOKS = 16  # between two turns of the event loop, which cost as much as some of them: ten microseconds in all
TURN_S = 0.0005  # at most between two turns of the loop, even where each message is here at the first looks
SLEEP_S = 0.1  # at most, before a parked side looks again

_HEAD, _PARKED = 0, 8  # in 8-byte words: a cache line each


def supported() -> bool:
    """Only where the processor itself keeps stores in order: Python has no release store."""
    return platform.machine() in ("x86_64", "AMD64")


class Ring:
    """One direction of a doorbell, as one of its two sides sees it. `close` before the memory is unmapped."""

    def __init__(self, memory: memoryview) -> None:
        """memory: RING_BYTES bytes, zeroed before the first use."""
        self._words = memory[:WORDS_BYTES].cast("Q")
        self._entries = [memory[start : start + ENTRY_BYTES] for start in range(WORDS_BYTES, RING_BYTES, ENTRY_BYTES)]
        self._count = 0
        self._fence = threading.Lock()

    def push(self, message: bytes) -> bool:
        """Adds a message; True if the consumer is parked, and must be woken."""
        entry = len(message).to_bytes(WORD_BYTES, "little") + message + bytes(-len(message) % WORD_BYTES)
        self._entries[self._count % ENTRIES][: len(entry)] = entry
        self._count += 1
        self._words[_HEAD] = self._count
        self._order_memory()
        if not self._words[_PARKED]:
            return False
        self._words[_PARKED] = 0
        return True

    def waiting(self) -> bool:
        """Whether there is something to pop."""
        return bool(self._words[_HEAD] != self._count)

    def pop(self) -> bytes | None:
        """The next message, copied, or None. Raises ProtocolError if the producer broke the ring."""
        waiting = self._words[_HEAD] - self._count
        if waiting == 0:
            return None
        entry = bytes(self._entries[self._count % ENTRIES])
        length = int.from_bytes(entry[:WORD_BYTES], "little")
        if not 0 < waiting <= ENTRIES or length > MAX_MESSAGE_BYTES:
            raise ProtocolError("the doorbell's ring is damaged")
        self._count += 1
        return entry[WORD_BYTES : WORD_BYTES + length]

    def park(self) -> bool:
        """Asks to be woken; False if there is a message after all."""
        self._words[_PARKED] = 1
        self._order_memory()
        if self._words[_HEAD] == self._count:
            return True
        self._words[_PARKED] = 0
        return False

    def close(self) -> None:
        self._words.release()
        for entry in self._entries:
            entry.release()

    def _order_memory(self) -> None:
        """A full fence: taking a lock is an atomic read-modify-write, which no load or store passes on x86-64."""
        with self._fence:
            pass


class Doorbell:
    """Both rings of one connection, as one side sees them.

    wake_peer: sends the empty Wake over ZeroMQ. looks: how many to take between two turns of the event loop, asked
    anew each time: polling takes a core and the loop's time, and must not take them from whoever computes what is
    waited for. LOOKS where nobody does; 0: none, sleep.
    """

    def __init__(self, outgoing: Ring, incoming: Ring, wake_peer: Callable[[], None], looks: Callable[[], int]) -> None:
        self._outgoing = outgoing
        self._incoming = incoming
        self._wake_peer = wake_peer
        self._looks = looks
        self._woken = asyncio.Event()
        self._near = True  # was the last message near enough to spin for?
        self._came_at = self._turn_at = time.perf_counter()

    def send(self, message: bytes) -> None:
        """message: at most MAX_MESSAGE_BYTES. Never waits: the ring has an entry for each call in flight."""
        if self._outgoing.push(message):
            self._wake_peer()

    async def receive(self) -> bytes:
        """The next message. Raises ProtocolError if the other side broke the ring."""
        while (message := self.pop()) is None:
            await self.arrival()
        return message

    def pop(self) -> bytes | None:
        """The next message if it is here. Raises ProtocolError if the other side broke the ring."""
        return self._incoming.pop()

    async def arrival(self, unwanted: Callable[[], bool] = lambda: False) -> None:
        """Waits until a message is here, or is unwanted: after that the memory is not looked at.

        Several may wait at once. As long as messages come for one of them, all look out for theirs.
        """
        start = time.perf_counter()
        if start - self._turn_at > TURN_S:
            await self._turn()
        while not unwanted() and not self.waiting():
            looks = self._looks()
            if not self._near or not looks or time.perf_counter() - max(start, self._came_at) > SPIN_S:
                await self._sleep()
            elif not self._look(looks):
                await self._turn()
        now = time.perf_counter()
        self._near = now - max(start, self._came_at) < SPIN_S
        self._came_at = now

    def waiting(self) -> bool:
        """Whether a message is here that nobody has received."""
        return self._incoming.waiting()

    def wake(self) -> None:
        """The other side's Wake has come."""
        self._woken.set()

    def close(self) -> None:
        self._outgoing.close()
        self._incoming.close()

    def _look(self, looks: int) -> bool:
        """Whether a message is here, perhaps after some time."""
        for _ in range(looks):
            if self._incoming.waiting():
                return True
            os.sched_yield()  # who computes what we wait for may be queued behind us on this core
        return False

    async def _turn(self) -> None:
        """Lets other coroutines run."""
        await asyncio.sleep(0)
        self._turn_at = time.perf_counter()

    async def _sleep(self) -> None:
        self._woken.clear()
        if self._incoming.park():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SLEEP_S):
                    await self._woken.wait()
