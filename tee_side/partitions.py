"""How one layer is split between the two sides. Each function is the whole layer, as straight-line code.

A partition gets the layer's norms, its index, the residual stream x: [tokens, hidden] float32, the GPU side,
and `attend(layer, qkv) -> context`, which rotates, stores and attends inside the enclave.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

import torch

from asynctsqp.model_spec import Op
from asynctsqp.operators import rms_norm, silu_mul
from tee_side.weights import Norms


class Gpu(Protocol):
    """What a partition may ask of the GPU side."""

    async def linear(self, op: Op, layer: int, x: torch.Tensor) -> torch.Tensor:
        """x: [rows, in_features] float32 -> [rows, out_features] float32."""


Attend = Callable[[int, torch.Tensor], torch.Tensor]
Partition = Callable[[Gpu, Norms, int, float, torch.Tensor, Attend], Awaitable[torch.Tensor]]


async def shielded(gpu: Gpu, norms: Norms, layer: int, epsilon: float, x: torch.Tensor, attend: Attend) -> torch.Tensor:
    """Four linears on the GPU; attention, the KV cache and everything non-linear never leave."""
    qkv = await gpu.linear(Op.QKV, layer, rms_norm(x, norms.attention, epsilon))
    context = attend(layer, qkv)
    x = x + await gpu.linear(Op.O, layer, context)
    gate_up = await gpu.linear(Op.GATE_UP, layer, rms_norm(x, norms.mlp, epsilon))
    return x + await gpu.linear(Op.DOWN, layer, silu_mul(gate_up))
