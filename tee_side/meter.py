"""What an engine tells a service about itself: counts since it was opened, and nothing of what was asked."""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from asynctsqp.errors import IntegrityError
from tee_side.request import RpcTotals

# Upper bounds in seconds: from a call through shared memory to a product over a slow network
ROUND_TRIP_BOUNDS = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.5, 2.0)


class Meter:
    """Written by the engine's thread; any thread may read it, a moment later than it is true."""

    def __init__(self) -> None:
        self.running = 0  # requests that take part in passes
        self.bytes_sent = 0
        self.bytes_received = 0
        self.pass_s = 0.0  # in which passes were computed, of all lanes
        self.wait_s = 0.0  # of that, waiting for the GPU side
        self.wrong_answers = 0  # passes that ended because a check failed, or refused to begin after that
        self.round_trip_s = 0.0
        self._round_trips = [0] * (len(ROUND_TRIP_BOUNDS) + 1)

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """While one is running."""
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    def called(self, seconds: float) -> None:
        """A call has come back, so long after it was sent."""
        self.round_trip_s += seconds
        self._round_trips[bisect_left(ROUND_TRIP_BOUNDS, seconds)] += 1

    def passed(self, totals: RpcTotals, seconds: float, error: BaseException | None) -> None:
        """A micro-batch has come back, or failed."""
        self.wrong_answers += isinstance(error, IntegrityError)
        self.bytes_sent += totals.bytes_sent
        self.bytes_received += totals.bytes_received
        self.wait_s += totals.wait_s
        self.pass_s += seconds

    def round_trips(self) -> list[int]:
        """Calls so far that took at most so long, for each of ROUND_TRIP_BOUNDS, and all of them."""
        return list(accumulate(self._round_trips))
