"""Attention of a decode step: one query of each of some sequences, whose pasts are small, on one thread.

A product of some ten thousand multiplications takes less time than the views of its operands. So the views are made
once a step, of all layers, and what is not a product is one call for all sequences: their scores lie side by side, with
minus infinity behind those of a shorter past. The sums are not: how they are rounded would depend on the longest past,
and nothing of a sequence may depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tee_side.arrays import Rows
from tee_side.attention import Run, Steps, weigh

TOGETHER = 4  # sequences' products in one step: some ten microseconds each


class DecodeAttention:
    """What attention.attend gives for each sequence's query, to the bit. The context is overwritten by the next."""

    def __init__(self, pasts: Sequence[Sequence[Run]], group: int) -> None:
        """pasts: of each sequence, all layers' runs, [layers, kv_heads, keys, head_dim], that end with the query's key.

        group: query heads that share a key head.
        """
        lengths = [sum(keys.shape[2] for keys, _ in runs) for runs in pasts]
        _, kv_heads, _, head_dim = pasts[0][0][0].shape
        self._scale = np.float32(head_dim**-0.5)
        self._q: Rows = np.empty((len(pasts), kv_heads, group, head_dim), np.float32)
        self._scores: Rows = np.empty((len(pasts), kv_heads, group, max(lengths)), np.float32)
        self._contexts = np.empty_like(self._q)
        self._sums = np.empty_like(self._scores[..., :1])
        each = zip(pasts, lengths, self._q, self._scores, self._contexts, self._sums, strict=True)
        sequences = [
            _Sequence(runs, q, scores[..., :length], context, total) for runs, length, q, scores, context, total in each
        ]
        self._steps = [sequences[start : start + TOGETHER] for start in range(0, len(sequences), TOGETHER)]

    def attend(self, layer: int, q: Rows) -> Steps:
        """q: [n, heads, head_dim] -> the same."""
        np.multiply(q.reshape(self._q.shape), self._scale, out=self._q)
        self._scores.fill(-np.inf)
        for step in self._steps:
            for sequence in step:
                sequence.score(layer)
            if len(step) == TOGETHER:
                yield None
        self._scores -= np.maximum.reduce(self._scores, axis=-1, keepdims=True)
        np.exp(self._scores, out=self._scores)
        for step in self._steps:
            for sequence in step:
                sequence.weigh(layer)
            if len(step) == TOGETHER:
                yield None
        self._contexts /= self._sums
        yield self._contexts.reshape(q.shape)


class _Sequence:
    """Views of one sequence's part of everything."""

    __slots__ = ("_context", "_parts", "_q", "_shares", "_sum")

    def __init__(self, runs: Sequence[Run], q: Rows, scores: Rows, context: Rows, total: Rows) -> None:
        ends = np.cumsum([keys.shape[2] for keys, _ in runs])
        parts = np.split(scores, ends[:-1], axis=-1)
        self._parts = [(keys.swapaxes(2, 3), part, values) for (keys, values), part in zip(runs, parts, strict=True)]
        self._q = q
        self._shares = scores
        self._context = context
        self._sum = total

    def score(self, layer: int) -> None:
        for keys, scores, _ in self._parts:
            np.matmul(self._q, keys[layer], out=scores)

    def weigh(self, layer: int) -> None:
        """The sum of all values, each times its share; and the sum of the shares."""
        weigh([(shares, values[layer]) for _, shares, values in self._parts], self._context)
        np.add.reduce(self._shares, axis=-1, keepdims=True, out=self._sum)
