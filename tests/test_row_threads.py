"""The rows of a long block on several threads: each once, all before it returns, errors after all have ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from tee_side.row_threads import PIECE, RowThreads

ROWS = [0, 1, PIECE, PIECE + 1, 7 * PIECE + 3]


@pytest.fixture(params=[1, 3])
def row_threads(request: pytest.FixtureRequest) -> Iterator[RowThreads]:
    before = threading.active_count()
    made = RowThreads(request.param)
    yield made
    made.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("rows", ROWS)
def test_each_row_once(rows: int, row_threads: RowThreads) -> None:
    seen = np.zeros(rows, dtype=int)
    sizes: list[int] = []

    def work(some: slice) -> None:
        seen[some] += 1
        sizes.append(some.stop - some.start)

    row_threads.each(rows, work)
    assert (seen == 1).all()
    assert max(sizes) <= PIECE
    assert sum(sizes) == rows


def test_several_threads_work_at_once() -> None:
    threads = 3
    row_threads, together = RowThreads(threads), threading.Barrier(threads)
    row_threads.each(threads * PIECE, lambda some: together.wait(10))  # would break if one had to end first
    row_threads.close()


def test_an_error_comes_when_all_have_ended(row_threads: RowThreads) -> None:
    running = 0
    lock = threading.Lock()

    def work(some: slice) -> None:
        nonlocal running
        with lock:
            running += 1
        try:
            time.sleep(0.01)
            if some.start == 2 * PIECE:
                raise ValueError("this one")
        finally:
            with lock:
                running -= 1

    with pytest.raises(ValueError, match="this one"):
        row_threads.each(5 * PIECE, work)
    assert running == 0
