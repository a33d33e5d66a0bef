"""Products of 16-bit weights in float32, for a processor that cannot multiply 16-bit numbers by itself.

There torch multiplies bfloat16 and float16 in loops of its own, which take several times as long as float32's
products from some rows on (docs/measurements.md). So a piece of the weights at a time is made float32, in a cache, and
multiplied there. The sums are float32 either way, and are rounded once.
"""

from __future__ import annotations

import torch

from asynctsqp.quantize import slices

FEWEST_ROWS = 16  # of x: for fewer, the detour takes longer than the loops
WEIGHTS = 1 << 19  # that are float32 at once: 2 MiB
CHANNELS = 64  # of a piece, or a multiple: with odd numbers of them a product takes half as long again


def pays(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this processor has no instructions for products of this dtype. They would be oneDNN's."""
    if device.type != "cpu":
        return False
    try:
        multiplies = {
            torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
            torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
        }
    except AttributeError:  # torch was built without oneDNN
        return False
    return dtype in multiplies and not multiplies[dtype]()


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """x: [rows, in_features], weight: [out_features, in_features], all of one dtype -> out = x W^T (+ bias)."""
    features, width = weight.shape
    step = max(CHANNELS, WEIGHTS // width // CHANNELS * CHANNELS)
    given = x.float()
    scratch = torch.empty(min(step, features), width)
    room = torch.empty(len(x) * len(scratch))
    for columns in slices(features, step):
        piece = weight[columns]
        total = room[: len(x) * len(piece)].view(len(x), len(piece))
        torch.mm(given, scratch[: len(piece)].copy_(piece).t(), out=total)
        if bias is not None:
            total += bias[columns]
        out[:, columns] = total
