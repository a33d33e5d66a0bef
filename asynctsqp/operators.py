"""The non-linear parts of a LLaMA layer as torch computes them: pure functions over tensors on any device.

Formulas: LLaMA (Touvron et al. 2023) as in transformers' modeling_llama.
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
