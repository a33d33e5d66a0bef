"""Integer weights, made bit for bit alike on both sides from the same tensor of the checkpoint.

One scale for each output channel, symmetric: w ~ scale * q, |q| <= 127 with 8 bits and 2047 with 12. Only float32
maximum, division and round-half-to-even are used, each of which IEEE 754 defines to the last bit, on one row at a
time: neither threads, nor blocks, nor the device can change the result. 12 bits are kept as two signed digits,
q = 2^7 hi + lo, so that every product is one of int8.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from asynctsqp.errors import BadInputError, CheckpointError
from asynctsqp.limits import WEIGHT_DIGITS
from asynctsqp.tensor_codec import bytes_of

DIGIT_BITS = 7
SMALLEST_SCALE = 2.0**-100  # for rows of (almost) zeros: far below any weight, far above float32's subnormals
BLOCK = 1 << 22  # elements that are worked on at once: bounds the float copies of a large matrix


class Digest(Protocol):
    """What hashlib returns."""

    def update(self, data: memoryview, /) -> None: ...


@dataclass(frozen=True)
class Quantized:
    """One matrix. digits: [digits, N, K] int8, the most significant first; scales: [N] float32."""

    digits: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor, bits: int = 8) -> Quantized:
        """weight: [N, K] in any floating dtype; the result is on its device.

        Raises BadInputError for bits other than 8 or 12, CheckpointError where a weight is not finite.
        """
        if bits not in WEIGHT_DIGITS:
            raise BadInputError(f"--weight-bits is 8 or 12, not {bits}")
        rows, width = weight.shape
        digits = torch.empty(WEIGHT_DIGITS[bits], rows, width, dtype=torch.int8, device=weight.device)
        scales = torch.empty(rows, dtype=torch.float32, device=weight.device)
        for block in _blocks(rows, width):
            _quantize(weight[block], (1 << (bits - 1)) - 1, digits[:, block], scales[block])
        if not bool(scales.isfinite().all()):
            raise CheckpointError("the checkpoint holds weights that are not finite")
        return cls(digits, scales)

    @classmethod
    def stack(cls, parts: list[Quantized]) -> Quantized:
        """Matrices of the same width, one below the other: the same as quantizing the stacked weights."""
        if len(parts) == 1:
            return parts[0]
        digits = torch.cat([part.digits for part in parts], dim=1)
        return cls(digits, torch.cat([part.scales for part in parts]))

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K): output and input features."""
        return self.digits.shape[1], self.digits.shape[2]

    def values(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """(rows, their integers as float64 [rows, K]), block by block: all at once is eight times the memory."""
        for block in _blocks(*self.shape):
            total = self.digits[0, block].double()
            for digit in self.digits[1:]:
                total = total.mul_(1 << DIGIT_BITS).add_(digit[block])
            yield block, total

    def norm(self) -> float:
        """max_n ||W_n||_2 over the rows, in integer units; at least 1, so that it can be divided by."""
        return max([1.0, *(float(rows.square_().sum(dim=1).max().sqrt()) for _, rows in self.values())])

    def hash_into(self, digest: Digest) -> None:
        """Adds all that defines this matrix, for comparing what two sides made."""
        for tensor in (self.digits, self.scales):
            digest.update(memoryview(repr(tuple(tensor.shape)).encode()))
            digest.update(bytes_of(tensor.cpu().contiguous()))


def _quantize(weight: torch.Tensor, largest: int, digits: torch.Tensor, scales: torch.Tensor) -> None:
    """weight: [n, K]; fills digits [count, n, K] and scales [n]."""
    exact = weight.float()
    # A tensor, not a number: by a number CUDA multiplies with the rounded reciprocal instead
    divisor = torch.full_like(scales, largest)
    scales.copy_(exact.abs().amax(dim=1).div_(divisor).clamp_(min=SMALLEST_SCALE))
    rounded = torch.div(exact, scales.unsqueeze(1)).round_()
    if len(digits) == 1:
        digits[0].copy_(rounded)
        return
    whole = rounded.to(torch.int32)
    high = (whole + (1 << DIGIT_BITS - 1)) >> DIGIT_BITS
    digits[0].copy_(high)
    digits[1].copy_(whole - (high << DIGIT_BITS))


def _blocks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, BLOCK // max(width, 1))
    return slices(rows, step)


def slices(size: int, most: int) -> Iterator[slice]:
    """Of so many rows or columns, at most so many at a time."""
    return (slice(start, min(start + most, size)) for start in range(0, size, most))
