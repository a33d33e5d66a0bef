"""Streams for lanes that come and go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Stream = TypeVar("Stream", bound=Hashable)


class Streams(Generic[Stream]):
    """torch has 32 streams for each device, gives them out in turn and takes none back: the 33rd that is asked for is
    the first one again, whoever has it. So those that nobody has any more are given out first.
    """

    def __init__(self, make: Callable[[], Stream]) -> None:
        self._make = make
        self._free: list[Stream] = []
        self._users: Counter[Stream] = Counter()

    def take(self) -> tuple[Stream, bool]:
        """A stream, and whether nobody else has it."""
        stream = self._free.pop() if self._free else self._make()
        self._users[stream] += 1
        return stream, self._users[stream] == 1

    def give_back(self, stream: Stream) -> None:
        """One that was taken."""
        self._users[stream] -= 1
        if not self._users[stream]:
            del self._users[stream]
            self._free.append(stream)
