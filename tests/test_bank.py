"""Pads of the bank: right, each used once, within the memory that was given."""

from __future__ import annotations

import threading
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asynctsqp.key_stream import KeyStream
from asynctsqp.model_spec import Op
from asynctsqp.ring import Ring, RingWeight
from tee_side.bank import Bank, Matrix
from tee_side.masking import Pad
from tee_side.stock import AHEAD

CPU = torch.device("cpu")
RING = Ring(CPU, [(24, 16)])
SHAPES: dict[Matrix, tuple[int, int]] = {(Op.QKV, 0): (24, 16), (Op.DOWN, 0): (16, 30), (Op.LM_HEAD, 0): (50, 16)}
ROW_BYTES = 4 * (24 + 16 + 50)
AHEAD_BYTES = AHEAD * 4 * (16 + 32 + 16)  # rows of 30 words take 32


class Model:
    """Small random weights that count how often each was read."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.weights = {
            matrix: torch.randint(-127, 128, (1, *shape), generator=generator).to(torch.int8)
            for matrix, shape in SHAPES.items()
        }
        self.reads = Counter[Matrix]()

    def load(self, matrix: Matrix) -> RingWeight:
        self.reads[matrix] += 1
        return RingWeight(self.weights[matrix], CPU)

    def check(self, matrix: Matrix, rows: int, pad: Pad) -> list[bytes]:
        """That the pad hides and reveals what it should -> its rows of r."""
        mask = np.empty((rows, SHAPES[matrix][1]), dtype=np.int32)
        pad.mask(np.zeros(mask.shape), mask)
        exact = mask.astype(np.int64) @ self.weights[matrix][0].numpy().astype(np.int64).T
        reply = ((exact + 2**31) % 2**32 - 2**31).astype(np.int32)
        assert (pad.unmask(reply) == 0).all()
        return [row.tobytes() for row in mask]


def bank(model: Model, tokens: int) -> Bank:
    return Bank(SHAPES, model.load, RING, KeyStream(), AHEAD_BYTES + tokens * ROW_BYTES)


MATRICES = st.sampled_from(sorted(SHAPES))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.none(), st.tuples(MATRICES, st.integers(1, 12))), max_size=60), st.integers(0, 40))
def test_any_order_of_filling_and_taking(events: list[tuple[Matrix, int] | None], tokens: int) -> None:
    """None fills; every pad is right, no row of any mask is ever seen twice, memory stays within the limit."""
    model = Model()
    filled, seen = bank(model, tokens), list[bytes]()
    for event in events:
        if event is None:
            filled.fill_next()
        else:
            matrix, rows = event
            seen += model.check(matrix, rows, filled.take(matrix, rows))
        assert filled.nbytes <= tokens * ROW_BYTES
    assert len(set(seen)) == len(seen)


def test_a_full_bank_serves_without_reading_weights() -> None:
    model = Model()
    full = bank(model, 40)
    while full.fill_next():
        pass
    assert full.batch_rows == 20
    assert full.rows == 40
    reads = model.reads.total()
    assert reads == 2 * len(SHAPES), "each weight is read once for a whole batch"
    for matrix in SHAPES:
        for rows in (1, 18, 3, 18):  # across the edge between two batches, to the last row
            pad = full.take_ready(matrix, rows)
            assert pad is not None
            model.check(matrix, rows, pad)
        assert full.take_ready(matrix, 1) is None
    assert model.reads.total() == reads
    assert full.rows == full.nbytes == 0
    assert full.fill_next()


def test_a_long_call_does_not_use_up_what_short_ones_need() -> None:
    model = Model()
    some = bank(model, 20)
    while some.fill_next():
        pass
    model.check((Op.QKV, 0), 300, some.take((Op.QKV, 0), 300))
    assert some.rows == 20


def test_the_matrix_with_the_fewest_rows_is_filled_first() -> None:
    model = Model()
    some = bank(model, 20)
    for _ in SHAPES:
        some.fill_next()
    assert some.rows == some.batch_rows
    some.take((Op.DOWN, 0), 4)
    some.fill_next()
    assert model.reads[(Op.DOWN, 0)] == 2


def test_a_matrix_that_cannot_be_read_leaves_the_bank_as_it_was() -> None:
    model = Model()

    def broken(matrix: Matrix) -> RingWeight:
        raise OSError("the file is gone")

    some = Bank(SHAPES, broken, RING, KeyStream(), AHEAD_BYTES + 20 * ROW_BYTES)
    with pytest.raises(OSError, match="gone"):
        some.fill_next()
    assert some.nbytes == some.rows == 0
    some._load = model.load
    assert some.fill_next()


def test_threads_that_fill_and_take_at_once_share_no_row() -> None:
    model = Model()
    shared, seen, failed = bank(model, 30), list[bytes](), list[BaseException]()
    stop = threading.Event()

    def fill() -> None:
        while not stop.is_set():
            if not shared.fill_next():
                stop.wait(0.0002)

    def use(seed: int) -> None:
        chance, mine = np.random.default_rng(seed), list[bytes]()
        try:
            for _ in range(400):
                matrix = list(SHAPES)[chance.integers(len(SHAPES))]
                rows = int(chance.integers(1, 9))
                pad = shared.take_ready(matrix, rows) or shared.take(matrix, rows)
                mine += model.check(matrix, rows, pad)
        except BaseException as error:
            failed.append(error)
        seen.extend(mine)

    fillers = [threading.Thread(target=fill) for _ in range(2)]
    users = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
    for thread in fillers + users:
        thread.start()
    for thread in users:
        thread.join()
    stop.set()
    for thread in fillers:
        thread.join()
    assert not failed
    assert len(seen) > 5000
    assert len(set(seen)) == len(seen)
    assert shared.nbytes <= 30 * ROW_BYTES


@pytest.mark.parametrize("rows", [(1, 1), (20, 1), (1, 20), (3, 14)])
def test_threads_that_overtake_each_other_get_their_own_words(rows: tuple[int, int]) -> None:
    """Rows are taken out in one order and their words made in the other."""
    model, matrix = Model(), (Op.DOWN, 0)
    some = bank(model, 60)
    while some.fill_next():
        pass
    stock = some._stocks[matrix]
    parts = [stock.withdraw(count) for count in rows]
    later, earlier = stock.pad(parts[1]), stock.pad(parts[0])
    seen = model.check(matrix, rows[0], earlier) + model.check(matrix, rows[1], later)
    assert len(set(seen)) == sum(rows)
