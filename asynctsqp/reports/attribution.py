"""Whose is each moment of a span of time, when several things go on at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from asynctsqp.reports.phases import FloatArray


class Sweep:
    """One pass over the sorted boundaries of several layers of intervals, from 0 to `end`. O(n log n).

    layers: each [n, 2], begin and end of intervals within [0, end]; they may overlap in any way.
    """

    def __init__(self, layers: Sequence[FloatArray], end: float) -> None:
        points = np.unique(np.concatenate([[0.0, end], *(layer.ravel() for layer in layers)]))
        self._seconds = np.diff(points)
        self._covered = np.stack([_covered(layer, points) for layer in layers])

    def union(self, layer: int) -> float:
        """Seconds in which at least one interval of the layer runs."""
        return math.fsum(self._seconds[self._covered[layer]])

    def owned(self) -> tuple[float, ...]:
        """Seconds of each layer in which no layer before it runs, and at last the seconds in which none does.

        They are sums over the same cuts of the same time: together they are all of it, and none is negative.
        """
        nobody = np.ones((1, len(self._seconds)), bool)
        owner = np.argmax(np.concatenate([self._covered, nobody]), axis=0)
        return tuple(math.fsum(self._seconds[owner == k]) for k in range(len(self._covered) + 1))


def _covered(intervals: FloatArray, points: FloatArray) -> NDArray[np.bool_]:
    """[points - 1]: whether an interval runs from each point to the next."""
    begin, end = np.searchsorted(points, intervals).T
    opened = np.bincount(begin, minlength=len(points))
    closed = np.bincount(end, minlength=len(points))
    covered: NDArray[np.bool_] = np.cumsum(opened - closed)[:-1] > 0
    return covered
