"""The bank on an event loop: filled in the background whatever happens there, and never by the loop itself."""

from __future__ import annotations

import asyncio
import threading
from functools import partial
from typing import cast

import numpy as np
import pytest

from asynctsqp.model_spec import Op
from tee_side.bank import Bank, Matrix
from tee_side.masking import Pad
from tee_side.pads import BankPads
from tests.services import until

MATRIX: Matrix = (Op.QKV, 0)


class Shelf:
    """As a Bank that holds nothing: what is asked of it, and in which thread."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.filled = 0
        self.made_in: list[threading.Thread] = []
        self.rows = 0

    def fill_next(self) -> bool:
        self.filled += 1
        if self.failures:
            raise self.failures.pop(0)
        return False

    def take_ready(self, matrix: Matrix, rows: int) -> Pad | None:
        return None

    def take(self, matrix: Matrix, rows: int) -> Pad:
        self.made_in.append(threading.current_thread())
        return Pad(np.zeros((rows, 4), np.int32), np.zeros((rows, 4), np.int32))


def _more_than(shelf: Shelf, times: int) -> bool:
    return shelf.filled > times


@pytest.mark.parametrize("failure", [OSError("the file is gone"), MemoryError()], ids=repr)
def test_a_failure_in_the_background_does_not_end_the_filling(failure: Exception) -> None:
    shelf = Shelf(failure, failure)

    async def test() -> None:
        pads = BankPads(cast(Bank, shelf), 1)
        await until(lambda: shelf.filled == 1)
        for _ in range(3):
            before = shelf.filled
            await pads.take(MATRIX, 1)
            await until(partial(_more_than, shelf, before))
        await pads.close()

    asyncio.run(test())
    assert not shelf.failures


def test_who_asks_hears_of_a_failure() -> None:
    async def test() -> None:
        shelf = Shelf(OSError("the file is gone"))
        pads = BankPads(cast(Bank, shelf), 1)
        await until(lambda: shelf.filled == 1)
        shelf.failures = [OSError("the file is gone")]
        with pytest.raises(OSError, match="gone"):
            await pads.prepare(1)
        await pads.close()

    asyncio.run(test())


def test_masks_are_never_made_in_the_loops_own_thread() -> None:
    shelf = Shelf()

    async def test() -> None:
        pads = BankPads(cast(Bank, shelf), 1)
        await asyncio.gather(*[pads.take(MATRIX, 3) for _ in range(5)])
        await pads.close()

    asyncio.run(test())
    assert len(shelf.made_in) == 5
    assert threading.current_thread() not in shelf.made_in
