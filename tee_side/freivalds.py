"""Is y = x W^T? Checked with a few secret dot products instead of the product (Freivalds 1977), over the integers.

For each matrix the enclave draws S, uniform in [-64, 64)^(N x 8), and keeps T = W^T S from its own reading of the
weights. A true product is an integer vector below 2^30, so y S = x T must hold exactly. If y is wrong by an integer
vector e != 0, then for any e_n != 0 and whatever the other entries are, at most one of the 128 values of S_nj gives
e S_j = 0: it passes all eight columns with probability at most 128^-8 = 2^-56, whatever was wrong and whoever did it.

Everything is computed in float64, whose integers are exact below 2^53: |y S| <= 2^31 64 N for N up to 65,536 (larger
vocabularies are checked in parts), and |x T| is bounded by the scale rule of tee_side/masking.

Covered: any difference in any element of any row of a reply, also one that is 0 mod any power of two; replies that are
swapped, replayed or another layer's; wrong products of the enclave's own (the masks' u included).
Not covered: an activation that was wrong before it was sent; weights that differ from what their owner meant, since
the enclave reads the same files; the fact that the check failed, which the other side learns: S must not live on.
"""

from __future__ import annotations

import math
import secrets

import numpy as np
import numpy.typing as npt
import torch

from asynctsqp.errors import CheckpointError, IntegrityError
from asynctsqp.key_stream import Words
from asynctsqp.quantize import Quantized
from tee_side.masking import LIMIT, Doubles

COLUMNS = 8
HALF = 64  # S is in [-HALF, HALF)
MOST_CHANNELS = 1 << 16
EXACT = float(1 << 53)


class Check:
    """One matrix's secrets. Kept: 64 (N + K) bytes."""

    def __init__(self, weight: Quantized, norm: float) -> None:
        """weight: read by the enclave itself; norm: weight.norm().

        Raises CheckpointError where float64 would not be exact.
        """
        channels, width = weight.shape
        self._secret = _secret(channels)
        self._parts = [slice(start, start + MOST_CHANNELS) for start in range(0, channels, MOST_CHANNELS)]
        self._expected = np.zeros((width, COLUMNS * len(self._parts)))
        for rows, values in weight.values():
            for number, part in enumerate(self._parts):
                self._add(number, max(rows.start, part.start), min(rows.stop, part.stop), rows.start, values)
        # ||x||_1 <= sqrt(K) ||x||_2 <= sqrt(K) LIMIT / w2
        largest = float(np.abs(self._expected).max(initial=0.0))
        if largest * math.sqrt(width) * LIMIT / norm >= EXACT:
            raise CheckpointError("a matrix is too one-sided to be verified: run with --protect none or mask")

    def _add(self, number: int, start: int, stop: int, first: int, values: torch.Tensor) -> None:
        """Adds what rows `start` to `stop` of W, whose row `first` is values[0], give to part `number` of T."""
        if start < stop:
            rows = values[start - first : stop - first].cpu().numpy()
            self._expected[:, _columns(number)] += rows.T @ self._secret[start:stop]

    def expect(self, x: Doubles) -> Doubles:
        """x: x_q [n, K], integers that obey the scale rule -> x T, which a true reply will match. Before it arrives."""
        expected: Doubles = np.matmul(x, self._expected)
        return expected

    def verify(self, y: Words, expected: Doubles) -> None:
        """y: [n, N] int32 in private memory. Raises IntegrityError where any row of it is not x W^T."""
        for number, part in enumerate(self._parts):
            found = np.matmul(y[:, part].astype(np.float64), self._secret[part])
            if (found != expected[:, _columns(number)]).any():
                raise IntegrityError("a wrong answer of the GPU side was caught: do not use this GPU side any more")


def _columns(part: int) -> slice:
    return slice(COLUMNS * part, COLUMNS * (part + 1))


def _secret(channels: int) -> npt.NDArray[np.float64]:
    """[channels, COLUMNS], uniform in [-HALF, HALF): seven bits of each byte of the operating system's randomness."""
    drawn = np.frombuffer(secrets.token_bytes(channels * COLUMNS), dtype=np.uint8)
    return (drawn & (2 * HALF - 1)).astype(np.float64).reshape(channels, COLUMNS) - HALF
