"""Medians, and how sure one may be of the ratio of two."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """Holds the true median with probability `confidence`."""

    low: float
    high: float
    confidence: float


@dataclass(frozen=True)
class Comparison:
    """Two contenders, from samples taken in pairs, one after the other."""

    ours_median: float
    theirs_median: float
    ratio: float  # of the medians: below 1 means that ours is smaller
    interval: Interval  # of the ratio within a pair


def compare(ours: Sequence[float], theirs: Sequence[float]) -> Comparison:
    """The two samples of a pair must stand at the same place."""
    first, second = statistics.median(ours), statistics.median(theirs)
    pairs = [one / other for one, other in zip(ours, theirs, strict=True)]
    return Comparison(first, second, first / second, sign_interval(pairs))


def sign_interval(samples: Sequence[float]) -> Interval:
    """The sign test's interval of the median: two order statistics, exact whatever the distribution.

    From the k-th smallest to the k-th largest sample, with the largest k that reaches CONFIDENCE. Fewer than six
    samples cannot reach it; then it is all of them, and `confidence` says how much that is worth.
    """
    ordered = sorted(samples)
    count = len(ordered)
    k = 1
    while 2 * (k + 1) <= count and _coverage(count, k + 1) >= CONFIDENCE:
        k += 1
    return Interval(ordered[k - 1], ordered[count - k], _coverage(count, k))


def _coverage(count: int, k: int) -> float:
    """1 - 2 P(fewer than k of `count` samples lie below the median)."""
    return 1 - 2 * sum(math.comb(count, below) for below in range(k)) * 0.5**count
