"""The records of calls as arrays: when each phase began and ended, and what the GPU side claims."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from asynctsqp.reports.records import RpcRecord

FloatArray: TypeAlias = NDArray[np.float64]

PHASES = ("encode", "send", "wait", "receive", "decode")
ENCODE, SEND, WAIT, RECEIVE, DECODE = range(len(PHASES))


def boundaries(rpcs: Sequence[RpcRecord]) -> FloatArray:
    """[calls, 6], seconds on the TEE side's clock: phase k of PHASES lasts from column k to column k + 1."""
    rows = [(r.start_at, r.encode_s, r.send_s, r.wait_s, r.receive_s, r.decode_s) for r in rpcs]
    return np.array(rows, np.float64).reshape(-1, len(PHASES) + 1).cumsum(axis=1)


def phase(bounds: FloatArray, index: int) -> FloatArray:
    """[calls, 2]: begin and end of one phase, out of `boundaries`."""
    return bounds[:, index : index + 2]


def in_flight(bounds: FloatArray) -> FloatArray:
    """[calls, 2]: between these the GPU side can have computed. It may begin before our send returns, but not
    before the send began, and has ended when its answer is read."""
    return bounds[:, [SEND, RECEIVE]]


def claims(rpcs: Sequence[RpcRecord]) -> FloatArray:
    """[calls, 2]: the GPU side's start, on its own clock, and duration: finite, and nothing more is known."""
    return np.array([(r.gpu_start_at, r.gpu_s) for r in rpcs], np.float64).reshape(-1, 2)
