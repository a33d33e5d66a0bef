"""Tracks of a timeline: slices on one of them follow each other or lie one within another."""

from __future__ import annotations

from collections.abc import Sequence


def rows_of(slices: Sequence[tuple[int, int]]) -> list[int]:
    """For each slice (begin, end) of one lane the row, from 0, that it is drawn in.

    Each goes into the first row where it nests, so that a second one is needed only where two slices cross.
    """
    rows = [0] * len(slices)
    open_ends: list[list[int]] = []  # of each row: the ends of the slices that are open, the innermost last
    for index in sorted(range(len(slices)), key=lambda i: (slices[i][0], -slices[i][1])):
        begin, end = slices[index]
        rows[index] = _first_fit(open_ends, begin, end)
        open_ends[rows[index]].append(end)
    return rows


def _first_fit(open_ends: list[list[int]], begin: int, end: int) -> int:
    for row, ends in enumerate(open_ends):
        while ends and ends[-1] <= begin:
            ends.pop()
        if not ends or ends[-1] >= end:
            return row
    open_ends.append([])
    return len(open_ends) - 1
