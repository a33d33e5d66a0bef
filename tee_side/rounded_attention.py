"""Attention in bfloat16, for prompts in that dtype, on processors that multiply it by themselves.

torch's flash attention computes in float32 whatever the dtype, with a matrix library that is slow on some processors.
Here a few queries at a time have their scores written down, in a cache, and both products are oneDNN's: a third of the
time (docs/measurements.md). Scores and weights are rounded to bfloat16, the sums are not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tee_side.arrays import Rows
from tee_side.attention import Attend, Run, Steps, attend

FEWEST = 16  # queries that are worth it
QUERIES = 128  # at a time
SCORES = 1 << 22  # of them at a time, at most: 8 MiB


def attention_in(dtype: torch.dtype) -> Attend:
    """What attention is computed with where calls are in this dtype. Sealed ones are in int32: exact inputs."""
    return attend_rounded if dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported() else attend


def attend_rounded(q: Rows, before: Sequence[Run], own: Run, whole: bool) -> Steps:
    """As attention.attend, but that each step is of some queries, in any case."""
    queries, heads, head_dim = q.shape
    runs = (*before, own)
    tokens = sum(keys.shape[1] for keys, _ in runs)
    step = min(QUERIES, SCORES // (heads * tokens))
    if min(queries, step) < FEWEST:
        yield from attend(q, before, own, whole)
        return
    keys, values = (_rounded(parts) for parts in zip(*runs, strict=True))
    kv_heads = len(keys)
    grouped = torch.from_numpy(q).mul(head_dim**-0.5).bfloat16().view(queries, kv_heads, -1, head_dim)
    contexts = torch.empty(grouped.shape)
    later = torch.full((step, step), -math.inf, dtype=torch.bfloat16).triu_(1)
    for start in range(0, queries, step):
        rows = grouped[start : start + step].permute(1, 2, 0, 3)
        seen = tokens - queries + start + rows.shape[2]
        context = _attend(rows, keys[:, :seen], values[:, :seen], later)
        contexts[start : start + step] = context.permute(2, 0, 1, 3)
        yield None
    yield contexts.view(q.shape).numpy()


def _attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, later: torch.Tensor) -> torch.Tensor:
    """q: [kv_heads, group, n, head_dim], of the last n keys' tokens -> context, the same."""
    kv_heads, group, n, head_dim = q.shape
    seen = keys.shape[1]
    scores = torch.bmm(q.reshape(kv_heads, group * n, head_dim), keys.transpose(1, 2))
    scores.view(kv_heads, group, n, seen)[..., seen - n :].add_(later[:n, :n])
    torch.softmax(scores, dim=-1, out=scores)
    return torch.bmm(scores, values).view(q.shape)


def _rounded(parts: Sequence[Rows]) -> torch.Tensor:
    """[kv_heads, tokens, head_dim] in all."""
    rounded = [torch.from_numpy(part).bfloat16() for part in parts]
    return rounded[0] if len(rounded) == 1 else torch.cat(rounded, dim=1)
