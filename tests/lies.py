"""Lies that a GPU side may tell about a product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from asynctsqp.model_spec import Op


@dataclass
class Liar:
    """What a lie may be made of: chance, and what was answered before. earlier: by operation, layer and rows."""

    chance: np.random.Generator
    earlier: dict[tuple[Op, int, int], np.ndarray] = field(default_factory=dict)

    def remember(self, op: Op, layer: int, y: np.ndarray) -> None:
        self.earlier[op, layer, len(y)] = y.copy()


Lie = Callable[[Liar, Op, int, np.ndarray], None]  # changes y' [rows, features] int32 in place, or leaves it


def single_bit(liar: Liar, op: Op, layer: int, y: np.ndarray) -> None:
    y[tuple(liar.chance.integers(y.shape))] ^= np.int32(1 << int(liar.chance.integers(31)))


def single_word(liar: Liar, op: Op, layer: int, y: np.ndarray) -> None:
    y[tuple(liar.chance.integers(y.shape))] = liar.chance.integers(-(2**31), 2**31)


def whole_row(liar: Liar, op: Op, layer: int, y: np.ndarray) -> None:
    y[liar.chance.integers(len(y))] = liar.chance.integers(-(2**31), 2**31, y.shape[1])


def swapped_rows(liar: Liar, op: Op, layer: int, y: np.ndarray) -> None:
    if len(y) > 1:
        one, other = liar.chance.choice(len(y), 2, replace=False)
        y[[one, other]] = y[[other, one]]


def replayed(liar: Liar, op: Op, layer: int, y: np.ndarray) -> None:
    y[:] = liar.earlier.get((op, layer, len(y)), y)


def previous_layers(liar: Liar, op: Op, layer: int, y: np.ndarray) -> None:
    y[:] = liar.earlier.get((op, layer - 1, len(y)), y)


def all_zeros(liar: Liar, op: Op, layer: int, y: np.ndarray) -> None:
    y[:] = 0


def top_bit(liar: Liar, op: Op, layer: int, y: np.ndarray) -> None:
    y[tuple(liar.chance.integers(y.shape))] ^= np.int32(-(2**31))


def plus_or_minus_one(liar: Liar, op: Op, layer: int, y: np.ndarray) -> None:
    y[tuple(liar.chance.integers(y.shape))] += np.int32(liar.chance.choice([-1, 1]))


LIES: list[Lie] = [
    single_bit,
    single_word,
    whole_row,
    swapped_rows,
    replayed,
    previous_layers,
    all_zeros,
    top_bit,
    plus_or_minus_one,
]
SMALL = (single_bit, plus_or_minus_one)  # which `mask` may survive with the same text
