"""Activations as integers under one-time pads, so that what leaves the enclave is uniform whatever they are.

With W the integer weights, s_x a scale for each row and r uniform words from the key stream:

    x_q = round(x / s_x)      m = x_q + r  is sent      y' = m W^T  comes back      y = y' - r W^T = x_q W^T

all in int32 words that wrap around. s_x is chosen so that no true product reaches 2^30 (Cauchy-Schwarz:
|x_q W_n| <= ||x_q|| w2 with w2 = max_n ||W_n||, and ||x_q|| <= ||x|| / s_x + sqrt(K) / 2 after rounding):

    s_x = ||x|| w2 / (2^30 - w2 sqrt(K) / 2)

Covered: m is uniform, whatever x_q is, since r is (Shannon's one-time pad in the group of words); a pad cannot be used
twice, because using it takes its words away; a row that is not finite ends the call before its pad is touched, and
|x_q| <= 2^30 holds for all others, so a wrong earlier answer cannot push m out of uniformity.
Not covered: the number and the shapes of the calls and their timing; whether the answer is right (tee_side/freivalds);
copies of private values that the allocator leaves in the enclave's own memory.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from asynctsqp.errors import BadInputError, IntegrityError
from asynctsqp.key_stream import Words

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

LIMIT = float(1 << 30)  # of a true product; one wraps at 2^31
SMALLEST_SCALE = 1e-30


class Scale:
    """The scale rule for one matrix."""

    def __init__(self, width: int, norm: float) -> None:
        """width: K; norm: max_n ||W_n||_2 in integer units, at least 1.

        Raises BadInputError where rounding alone could make a product wrap.
        """
        room = LIMIT - norm * math.sqrt(width) / 2
        if room <= 0:
            raise BadInputError(f"rows of {width} weights are too wide to be masked: run with --protect none")
        self._factor = norm / room

    def quantize(self, x: Floats) -> tuple[Doubles, Doubles]:
        """x: [n, K] -> (x_q: [n, K], integers as float64; s_x: [n, 1]).

        Raises IntegrityError where a row is not finite: honest answers and a sound model never make one.
        """
        whole = x.astype(np.float64)
        squares = np.vecdot(whole, whole).tolist()  # for a few numbers Python is faster than numpy
        if not all(map(math.isfinite, squares)):
            raise IntegrityError("an activation is not finite: the GPU side or the model's files are damaged")
        column = np.array([max(math.sqrt(square) * self._factor, SMALLEST_SCALE) for square in squares]).reshape(-1, 1)
        np.divide(whole, column, out=whole)
        np.rint(whole, out=whole)
        return whole, column


def dequantize(y: Words, scales: Doubles, channels: Floats, bias: Floats | None, out: Floats) -> None:
    """y: [n, N] integers, scales: [n, 1], channels: [N] scales of the weights -> out = y scales channels + bias."""
    np.copyto(out, y, casting="unsafe")
    np.multiply(out, channels, out=out)
    np.multiply(out, scales.astype(np.float32), out=out)
    if bias is not None:
        np.add(out, bias, out=out)


class Pad:
    """The masks of one call's rows, and their product with the weights. Used once; a call that fails burns it."""

    def __init__(self, mask: Words, *products: Words) -> None:
        """mask: r [n, K]; products: u = r W^T mod 2^32, [n, N] in one or more parts, one below the other."""
        self._mask: Words | None = mask
        self._products: tuple[Words, ...] | None = products

    def mask(self, x: Doubles, out: Words) -> None:
        """x: x_q as `Scale.quantize` gives it -> out = x + r mod 2^32, which may be read by anyone. Only once."""
        mask, self._mask = self._mask, None
        if mask is None:
            raise RuntimeError("a pad was about to be used twice")
        # The private integers are made in private memory: `out` may lie in shared memory, and gets the sum only
        np.add(x.astype(np.int32), mask, out=out)

    def unmask(self, reply: Words) -> Words:
        """reply: y' [n, N] in private memory -> y = y' - u mod 2^32, in its place. Only once."""
        products, self._products = self._products, None
        if products is None:
            raise RuntimeError("a pad was about to be used twice")
        start = 0
        for product in products:  # they are many megabytes where the call is long: not copied together first
            part = reply[start : start + len(product)]
            np.subtract(part, product, out=part)
            start += len(product)
        return reply
