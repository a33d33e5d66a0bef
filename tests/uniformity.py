"""Whether words are uniform: chi-square of bytes and halves, and each bit's balance, as one probability.

Pearson's chi-square test: with n samples in k equally likely cells the statistic sum (count - n/k)^2 / (n/k) follows a
chi-square distribution of k - 1 degrees, whose upper tail is the regularised incomplete gamma function
Q((k - 1) / 2, statistic / 2). A bit's balance: Hoeffding's bound, P(|ones - n/2| >= t) <= 2 exp(-2 t^2 / n).
The smallest probability times the number of tests bounds the chance that any of them is so small (Bonferroni), so a
test that fails below FALSE_ALARM does so for uniform words at most that often.
"""

from __future__ import annotations

import math

import numpy as np
import torch

FALSE_ALARM = 1e-6  # of all the tests of one sample together
WORDS = 10**7


def chi_square(counts: np.ndarray) -> float:
    """The probability that equally likely values differ by so much."""
    mean = counts.sum() / counts.size
    statistic = float(((counts - mean) ** 2 / mean).sum())
    tail = torch.special.gammaincc(torch.tensor((counts.size - 1) / 2).double(), torch.tensor(statistic / 2).double())
    return float(tail)


def uniformity(words: np.ndarray) -> float:
    """The probability of each byte's, of all bytes', both halves' and 32 bits' deviations, times their number."""
    unsigned = np.ascontiguousarray(words).view(np.uint32).ravel()
    bytes_counts = [np.bincount((unsigned >> (8 * byte)) & 255, minlength=256) for byte in range(4)]
    found = [chi_square(counts) for counts in [*bytes_counts, np.sum(bytes_counts, axis=0)]]
    found += [chi_square(np.bincount((unsigned >> (16 * half)) & 65_535, minlength=65_536)) for half in range(2)]
    for bit in range(32):
        off = abs(int(((unsigned >> bit) & 1).sum()) - unsigned.size / 2)
        found.append(min(1.0, 2 * math.exp(-2 * off**2 / unsigned.size)))
    return min(1.0, min(found) * len(found))
