"""The non-linear parts of a layer for the many rows of a prompt: torch, with its threads.

Rows are [n, features] float32 arrays, as in few_rows.py, which has the same functions.
"""

from __future__ import annotations

import torch

from asynctsqp import operators
from tee_side.arrays import Rows


def rms_norm(x: Rows, weight: Rows, epsilon: float) -> Rows:
    """x / sqrt(mean(x^2) + epsilon) * weight. Without torch's rms_norm, which has no kernel of its own on a CPU."""
    rows = torch.from_numpy(x)
    scale = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    scale.square_().div_(x.shape[1]).add_(epsilon).rsqrt_()
    y: torch.Tensor = rows * scale
    return y.mul_(torch.from_numpy(weight)).numpy()


def silu_mul(gate_up: Rows) -> Rows:
    """[n, 2 * intermediate], gate first -> silu(gate) * up."""
    return operators.silu_mul(torch.from_numpy(gate_up)).numpy()


def rotate(x: Rows, cos: Rows, sin: Rows) -> Rows:
    """Rotary embedding. x: [n, heads, head_dim]; cos, sin: rope.Angles."""
    rows = torch.from_numpy(x)
    first, second = rows.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    return swapped.mul_(torch.from_numpy(sin)).addcmul_(rows, torch.from_numpy(cos)).numpy()


def add(x: Rows, y: Rows) -> Rows:
    """x + y, in x."""
    torch.from_numpy(x).add_(torch.from_numpy(y))
    return x


def put(room: Rows, x: Rows) -> None:
    """x, copied to where it is gathered."""
    torch.from_numpy(room).copy_(torch.from_numpy(x))
