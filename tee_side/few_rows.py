"""The non-linear parts of a layer for the few rows of a decode step: numpy, in place, one thread.

Between two of them the product has gone through all caches, so what a step costs is the code and the data that it
touches anew: a chain of numpy calls shares most of its code, and wakes no thread. benchmarks.kernels compares them.

Rows are [n, features] float32. The same functions for many rows are in many_rows.py.
"""

from __future__ import annotations

import numpy as np

from tee_side.arrays import Rows


def rms_norm(x: Rows, weight: Rows, epsilon: float) -> Rows:
    """x / sqrt(mean(x^2) + epsilon) * weight."""
    scale = np.vecdot(x, x)
    scale /= x.shape[1]
    scale += epsilon
    np.sqrt(scale, out=scale)
    y: Rows = x / scale[:, None]
    y *= weight
    return y


def silu_mul(gate_up: Rows) -> Rows:
    """[n, 2 * intermediate], gate first -> gate / (1 + exp(-gate)) * up."""
    size = gate_up.shape[1] // 2
    gate = gate_up[:, :size]
    y: Rows = np.negative(gate)
    np.exp(y, out=y)  # infinite for a very negative gate, which is right: the quotient is zero
    y += 1
    np.divide(gate, y, out=y)
    y *= gate_up[:, size:]
    return y


def rotate(x: Rows, cos: Rows, sin: Rows) -> Rows:
    """Rotary embedding. x: [n, heads, head_dim]; cos, sin: rope.Angles."""
    halves = x.reshape(*x.shape[:2], 2, -1)
    y: Rows = halves[:, :, ::-1] * sin.reshape(len(x), 1, 2, -1)
    y = y.reshape(x.shape)
    y += x * cos
    return y


def add(x: Rows, y: Rows) -> Rows:
    """x + y, in x."""
    x += y
    return x


def put(room: Rows, x: Rows) -> None:
    """x, copied to where it is gathered."""
    room[...] = x
