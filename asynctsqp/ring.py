"""Exact products with integer weights in Z_2^32: int32 words that wrap around, on the CPU and on CUDA.

    y = x W^T mod 2^32        x: [n, K] any int32, W: [N, K] int8 digits, y: [n, N] int32

x is four bytes. x XOR 0x00808080 turns the three low bytes into signed digits d_i with no arithmetic:
x = sum_i 2^(8i) d_i + 0x808080, so y = sum_i 2^(8i) (d_i W^T) + 0x808080 rowsum(W), and the last term is a constant of
the output channel. The four digit planes are stacked along the rows, so that one int8 GEMM reads the weights once; its
results are put together in int32, in place. A digit's own product is below 2^14 K and never wraps.

`torch._int_mm` is private, silently wrong on some machines (x86 before VNNI adds pairs with saturation), and on others,
for whose processor there is no kernel, a plain loop that takes thirty times as long as float64. So when a Ring is made
it is timed and compared with an exact product, and if it is slow or wrong the products are made in float64.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from asynctsqp.quantize import DIGIT_BITS, slices

PLANES = 4
SIGNS = 0x00808080
ALIGNMENT = 8  # of K and N, for CUDA
COLUMNS = 8192  # of one GEMM at most
# Words of unfinished products made at once, and digit rows at least: CUDA needs more than 16
CPU_SIZES, CUDA_SIZES = (1 << 21, PLANES), (1 << 26, 32)
FLOAT64_WIDTH = 1 << 15  # 2^31 * 127 * K < 2^53 up to K = 33,000
FLOAT64_WEIGHTS = 1 << 19  # that are float64 at once: 4 MiB, which a cache holds until they are used
MOST_TEST_ROWS = 256
TIMED_ROWS, TIMED_SIZE, TIMINGS = 4, 512, 5  # of x, of the weights either way, and how often: milliseconds in all
LEAST = -(1 << 31)


# A tensor of CUDA, or numpy's view of one on the CPU, whose operations take half as long to begin: a decode step's
# product has a dozen. Only what both write alike is used.
Array = Any


@dataclass(frozen=True)
class _Tile:
    """Some output channels. digits: [padded K, columns] int8 each; constant: [columns]; columns: of the output."""

    digits: tuple[torch.Tensor, ...]
    constant: Array
    columns: slice


class RingWeight:
    """A matrix W ready for `Ring.product`: padded with zeros to what CUDA asks for, and cut into tiles once.

    A decode step's product takes tens of microseconds, of which each view made then would be two.
    """

    def __init__(self, digits: torch.Tensor, device: torch.device) -> None:
        """digits: [digits, N, K] int8 as Quantized has them. Kept as they are where no padding is needed."""
        count, self.rows, self.width = digits.shape
        padding = (0, -self.width % ALIGNMENT, 0, -self.rows % ALIGNMENT)
        padded = F.pad(digits, padding) if any(padding) else digits
        self._digits = padded.to(device).contiguous()
        total = torch.zeros(padded.shape[1], dtype=torch.int64, device=device)
        for digit in self._digits:
            total = (total << DIGIT_BITS) + digit.sum(dim=1, dtype=torch.int64)
        constant = (total * SIGNS).to(torch.int32)
        self.padded_width = padded.shape[2]
        self.tiles = tuple(
            _Tile(
                tuple(self._digits[number, start : start + COLUMNS].t() for number in range(count)),
                _array(constant[start : start + COLUMNS]),
                slice(start, start + COLUMNS),
            )
            for start in range(0, padded.shape[1], COLUMNS)
        )
        self.nbytes = self._digits.nbytes + constant.nbytes


Compute = Callable[[torch.Tensor, RingWeight, torch.Tensor], None]


class Ring:
    """Products on one device. `integer` says whether they are of integers or of float64, which gives the same words."""

    def __init__(self, device: torch.device, shapes: Iterable[tuple[int, int]], digits: int = 1) -> None:
        """shapes: (N, K) of every matrix in use, for the self-test; digits: of each weight, as in Quantized."""
        tiles = {(columns, width) for rows, width in shapes for columns in _tile_columns(rows)}
        self.device = device
        self._words, self._least_rows = CUDA_SIZES if device.type == "cuda" else CPU_SIZES
        self._int8 = torch.int8 if device.type == "cuda" else np.int8
        try:
            self.integer = self._is_fast() and all(self._is_right(*tile, digits) for tile in sorted(tiles))
        except RuntimeError:  # there is no such product here, or not for this device
            self.integer = False

    def product(self, x: torch.Tensor, weight: RingWeight, out: torch.Tensor) -> torch.Tensor:
        """x: [n, K], contiguous, out: [n, N], both int32 on this device -> out = x W^T mod 2^32.

        Holds no state: any number of threads may call it.
        """
        compute = self._integer if self.integer else self._float
        compute(x, weight, out)
        return out

    def _integer(self, x: torch.Tensor, weight: RingWeight, out: torch.Tensor) -> None:
        given, result = _array(x), _array(out)
        step = self._block_rows(weight.rows)
        for start in range(0, len(given), step):
            self._block(given[start : start + step], weight, result[start : start + step])

    def _block_rows(self, columns: int) -> int:
        return max(1, self._words // (PLANES * min(columns, COLUMNS)))

    def _block(self, x: Array, weight: RingWeight, out: Array) -> None:
        planes = self._planes(x, weight)
        for tile in weight.tiles:
            total = _digit_product(planes, tile.digits[0], len(x))
            for digit in tile.digits[1:]:
                total <<= DIGIT_BITS
                total += _digit_product(planes, digit, len(x))
            total += tile.constant
            result = out[:, tile.columns]
            result[:] = total[:, : result.shape[1]]  # without the padding

    def _planes(self, x: Array, weight: RingWeight) -> torch.Tensor:
        """x: [n, K] int32 -> its signed digits: [4 n, padded K] int8, the least significant plane first.

        There are more planes, of zeros, where 4 n is less than the least number of rows.
        """
        rows, width = x.shape
        digits = (x ^ SIGNS).view(self._int8).reshape(rows * width, PLANES).T.reshape(PLANES, rows, width)
        count = max(PLANES, -(-self._least_rows // rows))
        planes = torch.zeros(count, rows, weight.padded_width, dtype=torch.int8, device=self.device)
        _array(planes)[:PLANES, :, :width] = digits
        return planes.view(count * rows, weight.padded_width)

    def _float(self, x: torch.Tensor, weight: RingWeight, out: torch.Tensor) -> None:
        """The same exactly, as float64 sums of at most FLOAT64_WIDTH products."""
        given = x.double()
        for tile in weight.tiles:
            result = out[:, tile.columns]
            for columns in slices(result.shape[1], max(1, FLOAT64_WEIGHTS // weight.width)):
                total = torch.zeros(result[:, columns].shape, dtype=torch.int64, device=x.device)
                for digit in tile.digits:
                    total <<= DIGIT_BITS
                    for part in slices(weight.width, FLOAT64_WIDTH):
                        total += (given[:, part] @ digit[part, columns].double()).long()
                result[:, columns] = total  # keeps the low 32 bits

    def _is_fast(self) -> bool:
        """Whether integers take less time than float64. The best of some runs each: they differ tenfold either way."""
        if self.device.type != "cpu":
            return True
        weight = RingWeight(_test_digits(1, TIMED_SIZE, TIMED_SIZE), self.device)
        x, out = _test_words(TIMED_ROWS, TIMED_SIZE), torch.empty(TIMED_ROWS, TIMED_SIZE, dtype=torch.int32)

        def seconds(compute: Compute) -> float:
            start = time.perf_counter()
            compute(x, weight, out)
            return time.perf_counter() - start

        integers, floats = (min(seconds(way) for _ in range(TIMINGS)) for way in (self._integer, self._float))
        return integers < floats

    def _is_right(self, columns: int, width: int, digits: int) -> bool:
        """Whether a tile's integer product is float64's: a decode step's, a full block's, and in between."""
        weight = RingWeight(_test_digits(digits, columns, width), self.device)
        for count in (1, 2, 5, 16, min(self._block_rows(columns), MOST_TEST_ROWS)):
            x = _test_words(max(count, 3), width).to(self.device)
            made, exact = (torch.empty(len(x), weight.rows, dtype=torch.int32, device=self.device) for _ in range(2))
            for block, result in zip(x.split(count), made.split(count), strict=True):
                self._integer(block, weight, result)
            self._float(x, weight, exact)
            if not torch.equal(made, exact):
                return False
        return True


def _digit_product(planes: torch.Tensor, digit: torch.Tensor, rows: int) -> Array:
    """The planes' products put together, still without the constant: [rows, columns] int32. digit: [K, columns]."""
    words = torch._int_mm(planes, digit)
    columns = words.shape[1]
    parts = _array(words).reshape(-1, rows, columns)
    total = parts[PLANES - 1]
    for number in reversed(range(PLANES - 1)):
        total <<= 8
        total += parts[number]
    return total


def _tile_columns(rows: int) -> set[int]:
    """Of the tiles that a matrix of so many rows is cut into: of the whole ones, and of the last."""
    return {min(rows, COLUMNS), rows % COLUMNS or COLUMNS}


def _array(tensor: torch.Tensor) -> Array:
    """The same memory as numpy's where that is possible."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


def _test_words(rows: int, width: int) -> torch.Tensor:
    """[rows, width] int32: rows over the whole range, rows whose digits are all 127, and all -128."""
    generator = torch.Generator().manual_seed(rows * width)
    words = torch.randint(LEAST, -LEAST, (rows, width), generator=generator)
    words[1::3], words[2::3] = -LEAST - 1, LEAST
    return words.to(torch.int32)


def _test_digits(digits: int, rows: int, width: int) -> torch.Tensor:
    """[digits, rows, width] int8: a row of each end of the range, the others over all of it."""
    generator = torch.Generator().manual_seed(rows + width)
    weights = torch.randint(-127, 128, (digits, rows, width), generator=generator)
    weights[:, ::7], weights[:, 1::7] = 127, -127
    return weights.to(torch.int8)
