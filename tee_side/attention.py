"""Attention of some queries to keys and values that lie in several runs of memory.

Query heads that share a key head are a group: heads = kv_heads * group. Nothing is repeated in memory for them.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch

from tee_side.arrays import Rows

# Elements of keys up to which one thread is enough for a single query: its work is reading them, half a MiB.
SMALL = 1 << 17

Run = tuple[Rows, Rows]  # keys and values, [kv_heads, keys, head_dim] each: views
Steps = Iterator[Rows | None]  # None as often as there is more to do, and last the context
Part = tuple[torch.Tensor, torch.Tensor]  # the context of one run, and the log-sum-exp of its scores


class Attend(Protocol):
    """`attend`, or what takes its place."""

    def __call__(self, q: Rows, before: Sequence[Run], own: Run, whole: bool) -> Steps: ...


def attend(q: Rows, before: Sequence[Run], own: Run, whole: bool) -> Steps:
    """q: [n, heads, head_dim]; own: the run that ends with the queries' own n keys -> context, like q, step by step.

    Query i sees all runs before and, of its own, the keys up to its own. whole: in one step, or else in one for
    each key head and run.
    """
    queries, _, head_dim = q.shape
    kv_heads = len(own[0])
    if not queries:
        yield q
    elif queries == 1:
        yield _single(q.reshape(kv_heads, -1, head_dim), [*before, own]).reshape(q.shape)
    else:
        grouped = q.reshape(queries, kv_heads, -1, head_dim).transpose(1, 2, 0, 3)
        first = own[0].shape[1] - queries
        past = [*before, _slice(own, slice(first))] if first else before
        parts = []
        for run, causal in [*((run, False) for run in past), (_slice(own, slice(first, None)), True)]:
            part = yield from _flash_by_heads(grouped, run, causal, whole)
            parts.append(part)
        yield merge(parts).permute(2, 0, 1, 3).reshape(q.shape).numpy()


def _single(q: Rows, runs: Sequence[Run]) -> Rows:
    """q: [kv_heads, group, head_dim] -> the same."""
    if is_small(runs):
        return _softmax_of_scores(q, runs)
    parts = [flash_of_one(torch.from_numpy(q), *_tensors(run)) for run in runs]
    return merge(parts).numpy().reshape(q.shape)


def is_small(runs: Sequence[Run]) -> bool:
    """Whether one thread is enough for a single query."""
    return sum(keys.size for keys, _ in runs) <= SMALL


def _softmax_of_scores(q: Rows, runs: Sequence[Run]) -> Rows:
    """The textbook formula, on one thread. The reductions are called as ufuncs, which spares numpy's Python around."""
    q = q * np.float32(q.shape[-1] ** -0.5)
    parts = [np.matmul(q, keys.transpose(0, 2, 1)) for keys, _ in runs]
    scores: Rows = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
    scores -= np.maximum.reduce(scores, axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    context = np.empty_like(q)
    ends = np.cumsum([keys.shape[1] for keys, _ in runs])
    shares = np.split(scores, ends[:-1], axis=-1)
    weigh([(part, values) for part, (_, values) in zip(shares, runs, strict=True)], context)
    context /= np.add.reduce(scores, axis=-1, keepdims=True)
    return context


def weigh(parts: Sequence[tuple[Rows, Rows]], context: Rows) -> None:
    """Writes the sum of all values, each times its share.

    parts: of each run its tokens' shares, [kv_heads, group, tokens], and values; context: like a query.
    """
    (shares, values), *others = parts
    np.matmul(shares, values, out=context)
    for shares, values in others:
        context += np.matmul(shares, values)


def flash_of_one(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Part:
    """Flash attention of a single query, without materialising the scores. q: [kv_heads, group, head_dim].

    The group takes the place of the queries, which turns `group` passes over the past into one.
    """
    context, weight = _flash(q.unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0))
    return context[0], weight[0]


def _flash_by_heads(q: Rows, run: Run, causal: bool, whole: bool) -> Generator[None, None, Part]:
    """Flash attention to one run of keys, one of its heads in each step, without materialising the scores.

    q: [kv_heads, group, queries, head_dim] -> context, the same. causal: query i sees keys 0..i (queries == keys).
    The key heads are shared by a group of query heads through a stride of zero.
    """
    kv_heads, group, _, head_dim = q.shape
    rows, (keys, values) = torch.from_numpy(q), _tensors(run)
    shared = (kv_heads, group, keys.shape[1], head_dim)
    keys, values = keys.unsqueeze(1).expand(shared), values.unsqueeze(1).expand(shared)
    if whole:
        context, weight = _flash(rows, keys, values, is_causal=causal)
        return context, weight
    context, weight = torch.empty(q.shape), torch.empty(q.shape[:3])
    for head in range(kv_heads):
        one = slice(head, head + 1)
        context[one], weight[one] = _flash(rows[one], keys[one], values[one], is_causal=causal)
        yield
    return context, weight


def merge(parts: Sequence[Part]) -> torch.Tensor:
    """One attention from the partial ones over disjoint runs of keys.

    Weights each context by its share of the softmax's denominator (Dao et al., FlashAttention, 2022, section 3.1; the
    same rule as in flash decoding).
    """
    if len(parts) == 1:
        return parts[0][0]
    contexts = torch.stack([context for context, _ in parts])
    shares = torch.softmax(torch.stack([weight for _, weight in parts]), dim=0)
    return (contexts * shares.unsqueeze(-1)).sum(dim=0)


def probabilities(scores: Rows, head_dim: int) -> Rows:
    """q k^T of all keys: [kv_heads, group, n, keys] -> their softmax; a token sees itself and those before it."""
    new, keys = scores.shape[2:]
    table = torch.from_numpy(scores).mul_(head_dim**-0.5)
    if new > 1:
        later = torch.ones(new, keys, dtype=torch.bool).triu(keys - new + 1)
        table.masked_fill_(later, -math.inf)
    return torch.softmax(table, dim=-1).numpy()


def _tensors(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = run
    return torch.from_numpy(keys), torch.from_numpy(values)


def _slice(run: Run, keys: slice) -> Run:
    return run[0][:, keys], run[1][:, keys]


# The CPU kernel behind scaled_dot_product_attention; called by name because only it returns the log-sum-exp.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
