"""Attention as textbooks write it down, in float64, with all scores materialised; and ours, all steps of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tee_side.arrays import Rows
from tee_side.attention import Run, Steps


def scores(q: Rows, runs: Sequence[Run]) -> torch.Tensor:
    """q k^T / sqrt(head_dim): [heads, queries, keys], also of keys that a query must not see."""
    queries = torch.from_numpy(q).double().transpose(0, 1)
    keys = _shared([keys for keys, _ in runs], len(queries))
    return queries @ keys.transpose(1, 2) / q.shape[-1] ** 0.5


def attention(q: Rows, runs: Sequence[Run]) -> torch.Tensor:
    """softmax(scores) v: like q, [queries, heads, head_dim]; the queries are of the last tokens."""
    table = scores(q, runs)
    later = torch.ones(table.shape[-2:]).triu(table.shape[-1] - len(q) + 1).bool()
    values = _shared([values for _, values in runs], len(table))
    return (table.masked_fill(later, -torch.inf).softmax(-1) @ values).transpose(0, 1)


def last(steps: Steps) -> Rows:
    """What attention's steps come to."""
    *before, context = steps
    assert before == [None] * len(before)
    assert context is not None
    return context


def _shared(parts: Sequence[Rows], heads: int) -> torch.Tensor:
    """[heads, tokens, head_dim], from what a group of heads has in common."""
    whole = torch.from_numpy(np.concatenate(parts, axis=1)).double()
    return whole.repeat_interleave(heads // len(whole), 0)
