"""The GPU side's clock on the TEE side's: one offset, with its error.

A computation cannot begin before its call was being sent nor end after its answer was read, so each call bounds
the offset from both sides, as in Cristian's algorithm (Distributed Computing 3, 1989); what all calls allow is
narrower than what any one of them does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from asynctsqp.reports.phases import FloatArray, boundaries, claims, in_flight
from asynctsqp.reports.records import RpcRecord


class ClockOffset(msgspec.Struct, frozen=True):
    """TEE side's time = GPU side's time + offset_s, to within error_s. None: there was no call to tell by."""

    offset_s: float = 0.0
    error_s: float | None = None


def offset_of(rpcs: Sequence[RpcRecord]) -> ClockOffset:
    """The middle of the offsets that all calls allow, and half their width.

    Where no offset suits all calls (the clocks drift, or the claims are lies), that of the call with the tightest
    bounds, and half the width of these. Finite for whatever finite claims.
    """
    if not rpcs:
        return ClockOffset()
    sent, read = in_flight(boundaries(rpcs)).T
    start, seconds = claims(rpcs).T
    # A duration that its call has no room for is no bound; the start still is one.
    seconds = np.where(seconds <= read - sent, seconds, 0)
    low, high = sent - start, (read - seconds) - start
    lowest, highest = float(low.max()), float(high.min())
    if lowest > highest:
        tightest = int(np.argmin(read - sent - seconds))
        lowest, highest = float(low[tightest]), float(high[tightest])
        # of one call: does not lose digits to a start that is far away
        half = float(read[tightest] - sent[tightest] - seconds[tightest]) / 2
    else:
        half = (highest - lowest) / 2
    offset = lowest + half
    return ClockOffset(offset, max(half, math.ulp(offset)))


def computations(rpcs: Sequence[RpcRecord], clock: ClockOffset) -> FloatArray:
    """[calls, 2]: when the GPU side computed, on the TEE side's clock.

    Each is moved, and if need be cut, into what its call has room for: a claim cannot reach out of its own call.
    """
    sent, read = in_flight(boundaries(rpcs)).T
    start, seconds = claims(rpcs).T
    seconds = np.clip(seconds, 0, read - sent)
    with np.errstate(over="ignore"):  # of two absurd claims: the call's bounds come next
        start = start + clock.offset_s
    begin = np.clip(start, sent, np.maximum(sent, read - seconds))
    return np.stack([begin, np.minimum(begin + seconds, read)], axis=1)
