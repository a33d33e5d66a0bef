"""With how many threads short products are computed: what is chosen, from products whose times are known."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from asynctsqp.limits import DECODE_ROWS
from gpu_side.executor import Program, Tensors
from gpu_side.short_threads import SAMPLES, ShortThreads

ALL = 2
PRODUCTS = 3  # of a decode step


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(ALL)
    yield
    torch.set_num_threads(before)


class Product:
    """y = x, at a pace that depends on the number of threads; seen: with how many it was computed."""

    def __init__(self, one_s: float, all_s: float, error: float = 0.0) -> None:
        """error: in the result of a single thread."""
        self._seconds = {1: one_s, ALL: all_s}
        self._error = error
        self.seen: list[int] = []

    def __call__(self, inputs: Tensors, outputs: Tensors) -> None:
        threads = torch.get_num_threads()
        self.seen.append(threads)
        time.sleep(self._seconds[threads])
        outputs[0].copy_(inputs[0])
        if threads == 1:
            outputs[0].add_(self._error)


def compute(short: ShortThreads, program: Program, rows: int, repeats: object, dtype: torch.dtype) -> None:
    x, y = torch.ones(rows, 4, dtype=dtype), torch.zeros(rows, 4, dtype=dtype)
    start, seconds = short.timed(program, (x,), (y,), repeats)
    assert start <= time.perf_counter()
    assert seconds > 0
    assert torch.get_num_threads() == ALL, "whoever computes next in this thread has all"


def steps(short: ShortThreads, program: Program, count: int, rows: int = 1, dtype: torch.dtype = torch.float32) -> None:
    for _ in range(count):
        for number in range(PRODUCTS):
            compute(short, program, rows, (rows, number), dtype)


@pytest.mark.parametrize(("one_s", "all_s", "faster"), [(0.0002, 0.002, 1), (0.002, 0.0002, ALL)])
def test_the_faster_number_stays(one_s: float, all_s: float, faster: int) -> None:
    short, product = ShortThreads(ALL), Product(one_s, all_s)
    steps(short, product, 2 * SAMPLES)
    assert product.seen.count(1) == PRODUCTS * SAMPLES + 1, "each in turns, and one comparison of the bits"
    assert product.seen.count(ALL) == PRODUCTS * SAMPLES + 1
    product.seen.clear()
    steps(short, product, 3)
    compute(short, product, 1, None, torch.float32)
    assert set(product.seen) == {faster}


def test_each_shape_and_each_dtype_has_its_own() -> None:
    short = ShortThreads(ALL)
    few, many = Product(0.0002, 0.002), Product(0.002, 0.0002)
    steps(short, few, 2 * SAMPLES, rows=1)
    steps(short, many, 2 * SAMPLES, rows=4)
    steps(short, many, 2 * SAMPLES, rows=1, dtype=torch.bfloat16)
    for product, rows, dtype, threads in (
        (few, 1, torch.float32, 1),
        (many, 4, torch.float32, ALL),
        (many, 1, torch.bfloat16, ALL),
    ):
        product.seen.clear()
        steps(short, product, 1, rows, dtype)
        assert set(product.seen) == {threads}


def test_a_number_that_changes_a_bit_is_not_chosen() -> None:
    short, product = ShortThreads(ALL), Product(0.0, 0.002, error=1e-6)
    x, y = torch.ones(1, 4), torch.zeros(1, 4)
    for _ in range(4 * SAMPLES):
        short.timed(product, (x,), (y,), "again")
        assert torch.equal(x, y)
    assert product.seen.count(1) == 1, "the comparison"


def test_many_rows_and_a_single_thread_have_no_choice() -> None:
    short, product = ShortThreads(ALL), Product(0.0, 0.0001)
    steps(short, product, 4 * SAMPLES, rows=DECODE_ROWS + 1)
    assert set(product.seen) == {ALL}
    product.seen.clear()
    steps(ShortThreads(1), product, 4 * SAMPLES)
    assert set(product.seen) == {ALL}, "left as it is"


def test_what_does_not_repeat_is_not_compared() -> None:
    short, product = ShortThreads(ALL), Product(0.0, 0.0001)
    for _ in range(4 * SAMPLES):
        compute(short, product, 1, None, torch.float32)
    assert set(product.seen) == {ALL}
