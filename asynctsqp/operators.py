"""The non-linear parts of a LLaMA layer: pure functions over tensors, used wherever a layer runs.

All are written for float32 [tokens, features] rows. Formulas: LLaMA (Touvron et al. 2023) as in transformers'
modeling_llama.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x: [tokens, hidden], weight: [hidden] -> x / sqrt(mean(x^2) + epsilon) * weight."""
    return F.rms_norm(x, weight.shape, weight, epsilon)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up: [tokens, 2 * intermediate], gate first -> silu(gate) * up: [tokens, intermediate]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding. x: [tokens, heads, head_dim]; cos, sin: [tokens, 1, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1).mul_(sin).addcmul_(x, cos)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Flash attention of some queries to one contiguous run of keys, without materialising the scores.

    q: [kv_heads, group, queries, head_dim]; k, v: [kv_heads, keys, head_dim] float32
    -> (context [kv_heads, group, queries, head_dim], log-sum-exp of the scores [kv_heads, group, queries]).

    causal: query i sees keys 0..i (needs queries == keys). The key heads are shared by a group of query heads
    through a stride of zero: nothing is repeated in memory. A single query has its group folded into the
    query axis instead, which turns `group` passes over the past into one.
    """
    kv_heads, group, queries, head_dim = q.shape
    if queries == 1:
        folded = q.view(1, kv_heads, group, head_dim)
        context, weight = _flash(folded, k.unsqueeze(0), v.unsqueeze(0))
        return context.reshape(q.shape), weight.view(kv_heads, group, 1)
    shape = (kv_heads, group, k.shape[1], head_dim)
    context, weight = _flash(q, k.unsqueeze(1).expand(shape), v.unsqueeze(1).expand(shape), is_causal=causal)
    return context, weight


def merge(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """One attention from the partial ones over disjoint runs of keys.

    parts: (context, log-sum-exp) as `attend` returns them. Weights each context by its share of the softmax's
    denominator (Dao et al., FlashAttention, 2022, section 3.1; the same rule as in flash decoding).
    """
    if len(parts) == 1:
        return parts[0][0]
    contexts = torch.stack([context for context, _ in parts])
    shares = torch.softmax(torch.stack([weight for _, weight in parts]), dim=0)
    return (contexts * shares.unsqueeze(-1)).sum(dim=0)


# The CPU kernel behind scaled_dot_product_attention; called by name because only it returns the log-sum-exp.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
