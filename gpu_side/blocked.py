"""Weights in the layout that oneDNN's matrix product reads fastest: what torch's own compiler uses on a CPU.

On a processor with AVX-512 it makes products of 2 to 16 rows up to twice as fast as from rows and columns, and long
ones in float32 a fifth faster (docs/measurements.md). The operators carry no promise from one version of torch to the
next, so they are tried out first, and where they do not work weights stay as they are.
"""

from __future__ import annotations

import torch

from asynctsqp.limits import DECODE_ROWS
from gpu_side.executor import SHORT_WORK

MOST_ROWS = 1024  # of one product
TEST_ROWS, TEST_SIZES = 3, (72, 40)  # of the trial: [out_features, in_features]


def works(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of this dtype can be made this way here, and come out right."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-8, 9, TEST_SIZES, generator=generator).to(dtype)  # small integers: exact in any order
    bias = torch.randint(-8, 9, TEST_SIZES[:1], generator=generator).to(dtype)
    x = torch.randint(-1, 2, (TEST_ROWS, TEST_SIZES[1]), generator=generator).to(dtype)
    out = torch.empty(TEST_ROWS, TEST_SIZES[0], dtype=dtype)
    try:
        product(x, of(weight), bias, out)
    except (AttributeError, RuntimeError):  # there is no such operator, or none for this processor
        return False
    exact = x.double() @ weight.double().t() + bias.double()
    return torch.equal(out, exact.to(dtype))


def of(weight: torch.Tensor) -> torch.Tensor:
    """weight: [out_features, in_features] -> the same in blocks, of the same size; opaque to other operators."""
    made: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return made


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """weight: as `of` makes it -> out = x W^T (+ bias).

    Of a few numbers of rows at a time: oneDNN makes code for each, which takes a millisecond and memory that stays.
    """
    start = 0
    while start < len(x):
        end = start + _step(len(x) - start)
        out[start:end].copy_(torch.ops.mkldnn._linear_pointwise(x[start:end], weight, bias, "none", [], ""))
        start = end


def _step(rows: int) -> int:
    """A decode step's rows, or the largest power of two that is not above them."""
    return rows if rows <= DECODE_ROWS else min(MOST_ROWS, 1 << rows.bit_length() - 1)


def warm_up(weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Has the code made now for all numbers of rows, rather than by the first calls of each; longest ones excepted."""
    features, width = weight.shape
    powers = (1 << bits for bits in range(DECODE_ROWS.bit_length(), MOST_ROWS.bit_length()))
    for rows in (*range(1, DECODE_ROWS + 1), *powers):
        if rows * features * width <= SHORT_WORK:
            x, out = (torch.zeros(rows, size, dtype=weight.dtype) for size in (width, features))
            product(x, weight, bias, out)
