"""Attention of some queries to keys and values that lie in several runs of memory.

Query heads that share a key head are a group: heads = kv_heads * group. Nothing is repeated in memory for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from tee_side.arrays import Rows

# Elements of keys up to which one thread is enough for a single query: its work is reading them, half a MiB.
SMALL = 1 << 17

Run = tuple[Rows, Rows]  # keys and values, [kv_heads, keys, head_dim] each: views
Attend = Callable[[Rows, Sequence[Run], Run], Rows]  # `attend`, or what takes its place


def attend(q: Rows, before: Sequence[Run], own: Run) -> Rows:
    """q: [n, heads, head_dim]; own: the run that ends with the queries' own n keys -> like q.

    Query i sees all runs before and, of its own, the keys up to its own.
    """
    queries, heads, head_dim = q.shape
    kv_heads = len(own[0])
    if not queries:
        return q
    if queries == 1:
        return _single(q.reshape(kv_heads, heads // kv_heads, head_dim), [*before, own]).reshape(q.shape)
    grouped = q.reshape(queries, kv_heads, -1, head_dim).transpose(1, 2, 0, 3)
    first = own[0].shape[1] - queries
    parts = [flash(grouped, run, causal=False) for run in before]
    if first:
        parts.append(flash(grouped, _slice(own, slice(first)), causal=False))
    parts.append(flash(grouped, _slice(own, slice(first, None)), causal=True))
    return merge(parts).permute(2, 0, 1, 3).reshape(q.shape).numpy()


def _single(q: Rows, runs: Sequence[Run]) -> Rows:
    """q: [kv_heads, group, head_dim] -> the same."""
    if sum(keys.size for keys, _ in runs) <= SMALL:
        return _softmax_of_scores(q, runs)
    return merge([flash(q[:, :, None], run, causal=False) for run in runs]).numpy().reshape(q.shape)


def _softmax_of_scores(q: Rows, runs: Sequence[Run]) -> Rows:
    """The textbook formula, on one thread. The reductions are called as ufuncs, which spares numpy's Python around."""
    q = q * np.float32(q.shape[-1] ** -0.5)
    parts = [np.matmul(q, keys.transpose(0, 2, 1)) for keys, _ in runs]
    scores: Rows = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
    scores -= np.maximum.reduce(scores, axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    contexts, start = [], 0
    for keys, values in runs:
        end = start + keys.shape[1]
        contexts.append(np.matmul(scores[:, :, start:end], values))
        start = end
    context: Rows = contexts[0]
    for more in contexts[1:]:
        context += more
    context /= np.add.reduce(scores, axis=-1, keepdims=True)
    return context


def flash(q: Rows, run: Run, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Flash attention to one run of keys, without materialising the scores.

    q: [kv_heads, group, queries, head_dim] -> (context [kv_heads, group, queries, head_dim], log-sum-exp of the
    scores [kv_heads, group, queries]). causal: query i sees keys 0..i (needs queries == keys).

    The key heads are shared by a group of query heads through a stride of zero. A single query has its group folded
    into the query axis instead, which turns `group` passes over the past into one.
    """
    kv_heads, group, queries, head_dim = q.shape
    rows, keys, values = torch.from_numpy(q), torch.from_numpy(run[0]), torch.from_numpy(run[1])
    if queries == 1:
        folded = rows.reshape(1, kv_heads, group, head_dim)
        context, weight = _flash(folded, keys.unsqueeze(0), values.unsqueeze(0))
        return context.reshape(q.shape), weight.view(kv_heads, group, 1)
    shape = (kv_heads, group, keys.shape[1], head_dim)
    shared = keys.unsqueeze(1).expand(shape), values.unsqueeze(1).expand(shape)
    context, weight = _flash(rows, *shared, is_causal=causal)
    return context, weight


def merge(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """One attention from the partial ones over disjoint runs of keys.

    parts: (context, log-sum-exp) as `flash` returns them. Weights each context by its share of the softmax's
    denominator (Dao et al., FlashAttention, 2022, section 3.1; the same rule as in flash decoding).
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


def _slice(run: Run, keys: slice) -> Run:
    return run[0][:, keys], run[1][:, keys]


# The CPU kernel behind scaled_dot_product_attention; called by name because only it returns the log-sum-exp.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
