"""Wrong products against the check, right ones against its silence."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asynctsqp.errors import CheckpointError, IntegrityError
from asynctsqp.quantize import Quantized
from tee_side import freivalds
from tee_side.freivalds import Check
from tee_side.masking import Scale

LIES_OF_EACH_KIND = 1500


def matrix(rows: int, width: int, seed: int, bits: int = 8) -> tuple[Quantized, np.ndarray]:
    """And its integers, [rows, width] int64."""
    made = Quantized.of(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), bits)
    whole = np.zeros((rows, width), dtype=np.int64)
    for digit in made.digits.numpy():
        whole = whole * 128 + digit
    return made, whole


def rows_of(n: int, width: int, seed: int, norm: float) -> np.ndarray:
    x = torch.randn(n, width, generator=torch.Generator().manual_seed(seed)).numpy()
    return Scale(width, norm).quantize(x)[0]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 80), st.integers(1, 80), st.sampled_from([8, 12]), st.integers(0, 10**6))
def test_the_truth_always_passes(n: int, width: int, rows: int, bits: int, seed: int) -> None:
    weight, whole = matrix(rows, width, seed, bits)
    check = Check(weight, weight.norm())
    x = rows_of(n, width, seed + 1, weight.norm())
    check.verify((x.astype(np.int64) @ whole.T).astype(np.int32), check.expect(x))


def flip_a_bit(y: np.ndarray, chance: np.random.Generator) -> None:
    y[tuple(chance.integers(y.shape))] ^= np.int32(1) << np.int32(chance.integers(31))


def top_bit(y: np.ndarray, chance: np.random.Generator) -> None:
    y[tuple(chance.integers(y.shape))] ^= np.int32(-(2**31))


def all_top_bits(y: np.ndarray, chance: np.random.Generator) -> None:
    y ^= np.int32(-(2**31))


def change_a_word(y: np.ndarray, chance: np.random.Generator) -> None:
    y[tuple(chance.integers(y.shape))] ^= np.int32(chance.integers(1, 2**31))


def change_a_row(y: np.ndarray, chance: np.random.Generator) -> None:
    y[chance.integers(len(y))] = chance.integers(-(2**31), 2**31, y.shape[1])


def swap_rows(y: np.ndarray, chance: np.random.Generator) -> None:
    first, second = chance.choice(len(y), 2, replace=False)
    y[[first, second]] = y[[second, first]]


def swap_words(y: np.ndarray, chance: np.random.Generator) -> None:
    row, (first, second) = chance.integers(len(y)), chance.choice(y.shape[1], 2, replace=False)
    y[row, [first, second]] = y[row, [second, first]]


def zeros(y: np.ndarray, chance: np.random.Generator) -> None:
    y[:] = 0


def plus_or_minus_one(y: np.ndarray, chance: np.random.Generator) -> None:
    y[tuple(chance.integers(y.shape))] += np.int32(chance.choice([-1, 1]))


def one_that_cancels(y: np.ndarray, chance: np.random.Generator) -> None:
    """The sum of the row stays what it was."""
    row, (first, second) = chance.integers(len(y)), chance.choice(y.shape[1], 2, replace=False)
    y[row, first] += np.int32(1)
    y[row, second] -= np.int32(1)


LIES = [
    flip_a_bit,
    top_bit,
    all_top_bits,
    change_a_word,
    change_a_row,
    swap_rows,
    swap_words,
    zeros,
    plus_or_minus_one,
    one_that_cancels,
]


@pytest.mark.parametrize("lie", LIES)
def test_every_lie_is_caught(lie: Callable[[np.ndarray, np.random.Generator], None]) -> None:
    """One that passed would be a matter of 2^-56."""
    chance = np.random.default_rng(7)
    weight, whole = matrix(96, 64, seed=1)
    check = Check(weight, weight.norm())
    x = rows_of(3, 64, 2, weight.norm())
    expected, truth = check.expect(x), (x.astype(np.int64) @ whole.T).astype(np.int32)
    told = 0
    while told < LIES_OF_EACH_KIND:
        y = truth.copy()
        lie(y, chance)
        if np.array_equal(y, truth):
            continue
        told += 1
        with pytest.raises(IntegrityError):
            check.verify(y, expected)
    check.verify(truth, expected)


def test_anothers_answer_is_caught() -> None:
    """Replayed from before, or of another layer."""
    (weight, whole), (_, other) = matrix(40, 32, seed=1), matrix(40, 32, seed=2)
    check = Check(weight, weight.norm())
    for seed in range(200):
        x, before = rows_of(1, 32, seed, weight.norm()), rows_of(1, 32, seed + 1, weight.norm())
        for wrong in (before @ whole.T, x @ other.T):
            with pytest.raises(IntegrityError):
                check.verify(wrong.astype(np.int32), check.expect(x))


def test_a_vocabulary_is_checked_in_all_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freivalds, "MOST_CHANNELS", 30)
    monkeypatch.setattr("asynctsqp.quantize.BLOCK", 16 * 25)  # other edges than the parts'
    weight, whole = matrix(101, 16, seed=3)
    check = Check(weight, weight.norm())
    x = rows_of(2, 16, 4, weight.norm())
    truth = (x @ whole.T).astype(np.int32)
    check.verify(truth, check.expect(x))
    for channel in range(101):
        wrong = truth.copy()
        wrong[1, channel] += 1
        with pytest.raises(IntegrityError):
            check.verify(wrong, check.expect(x))


def test_the_largest_words_are_checked_exactly() -> None:
    """The most extreme reply and the widest part: float64 would round if a bound were wrong."""
    weight = Quantized.of(torch.ones(65_536, 8))
    check = Check(weight, weight.norm())
    check._secret[:] = -64
    y = np.full((1, 65_536), -(2**31), dtype=np.int32)
    exact = 64 * 2**31 * 65_536
    check.verify(y, np.full((1, 8), float(exact)))
    y[0, 77] += 1
    with pytest.raises(IntegrityError):
        check.verify(y, np.full((1, 8), float(exact)))


def test_a_matrix_that_float64_cannot_check_is_refused() -> None:
    weight = Quantized.of(torch.ones(65_536, 2))
    with pytest.raises(CheckpointError, match="one-sided"):
        Check(weight, norm=1e-6)


def test_secrets_are_fresh_and_use_their_whole_range() -> None:
    drawn = freivalds._secret(40_000)
    values, counts = np.unique(drawn, return_counts=True)
    assert values.tolist() == list(range(-64, 64))
    mean = drawn.size / 128
    statistic = torch.tensor(float(((counts - mean) ** 2 / mean).sum()))
    assert torch.special.gammaincc(torch.tensor(127 / 2), statistic / 2) > 1e-6
    assert not np.array_equal(drawn, freivalds._secret(40_000))
