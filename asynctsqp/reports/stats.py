"""Where the time of one answer went: the timing statistics of `--stats`.

Everything is clipped to the wall time of the answer. The rows of the sections count each operation on its own, so
that rows of what overlaps add up to more than the wall time; the totals give each moment to one category and add up
to exactly it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from asynctsqp.reports.advice import advise, traffic_of
from asynctsqp.reports.attribution import Sweep
from asynctsqp.reports.category import Category
from asynctsqp.reports.clock import ClockOffset, computations, offset_of
from asynctsqp.reports.phases import DECODE, ENCODE, RECEIVE, SEND, FloatArray, boundaries, phase
from asynctsqp.reports.records import Records, Span


class Row(msgspec.Struct, frozen=True):
    """One kind of operation. share: of the wall time, 0 to 1, and above 1 where several ran at once."""

    name: str
    count: int
    total_s: float
    average_s: float
    share: float


class Total(msgspec.Struct, frozen=True):
    """One category's part of the wall time."""

    name: str
    total_s: float
    share: float


class Overlap(msgspec.Struct, frozen=True):
    """What ran at the same time. busy: when at least one ran; gpu_hidden_s: of the GPU side's busy time that part
    in which the TEE side was at work too, so that nothing waited for it."""

    gpu_busy_s: float
    gpu_hidden_s: float
    rpc_total_s: float
    rpc_busy_s: float


class Stats(msgspec.Struct, frozen=True):
    """The timing statistics of one answer; msgspec.to_builtins makes them JSON."""

    wall_s: float
    bytes_sent: int
    bytes_received: int
    communication: tuple[Row, ...]
    gpu: tuple[Row, ...]  # by method; the GPU side's own measurement, as far as its calls have room for it
    tee: tuple[Row, ...]  # by the name of the span
    totals: tuple[Total, ...]  # in order of Category, all of them
    overlap: Overlap
    clock: ClockOffset
    advice: tuple[str, ...]


def stats_of(records: Records, start_at: float, end_at: float) -> Stats:
    """The statistics of the wall time from start_at to end_at, seconds on the TEE side's clock."""
    wall_s = max(end_at - start_at, 0.0)
    everything = list(records.rpcs)  # another answer, in another thread, may still add to them
    clock = offset_of(everything)  # not only of this answer's: more calls tell the offset better
    rpcs = [rpc for rpc in everything if rpc.end_at > start_at and rpc.start_at < end_at]
    spans = [span for span in records.spans if span.end_at > start_at and span.start_at < end_at]

    bounds = _clipped(boundaries(rpcs), start_at, wall_s)
    gpu = _clipped(computations(rpcs, clock), start_at, wall_s)
    tee = _clipped(_span_intervals(spans), start_at, wall_s)
    sweep = Sweep(
        (
            tee,
            np.concatenate([phase(bounds, ENCODE), phase(bounds, DECODE)]),
            np.concatenate([phase(bounds, SEND), phase(bounds, RECEIVE)]),
            gpu,
            bounds[:, [0, -1]],
        ),
        wall_s,
    )
    owned = dict(zip(Category, sweep.owned(), strict=True))
    shares = {category: _share(seconds, wall_s) for category, seconds in owned.items()}
    gpu_busy_s = sweep.union(list(Category).index(Category.GPU))
    return Stats(
        wall_s=wall_s,
        bytes_sent=sum(rpc.bytes_sent for rpc in rpcs),
        bytes_received=sum(rpc.bytes_received for rpc in rpcs),
        communication=_communication(bounds, gpu, wall_s),
        gpu=_rows([rpc.method for rpc in rpcs], _seconds(gpu), wall_s),
        tee=_rows([span.name for span in spans], _seconds(tee), wall_s),
        totals=tuple(Total(category.value, owned[category], shares[category]) for category in Category),
        overlap=Overlap(
            gpu_busy_s=gpu_busy_s,
            gpu_hidden_s=max(gpu_busy_s - owned[Category.GPU], 0.0),
            rpc_total_s=math.fsum(_seconds(bounds[:, [0, -1]])),
            rpc_busy_s=sweep.union(list(Category).index(Category.WIRE)),
        ),
        clock=clock,
        advice=advise(shares, traffic_of(rpcs)),
    )


def _clipped(times: FloatArray, start_at: float, wall_s: float) -> FloatArray:
    return np.clip(times - start_at, 0, wall_s)


def _span_intervals(spans: Sequence[Span]) -> FloatArray:
    return np.array([(span.start_at, max(span.start_at, span.end_at)) for span in spans], np.float64).reshape(-1, 2)


def _seconds(intervals: FloatArray) -> FloatArray:
    return intervals[:, 1] - intervals[:, 0]


def _share(seconds: float, wall_s: float) -> float:
    return seconds / wall_s if wall_s else 0.0


def _communication(bounds: FloatArray, gpu: FloatArray, wall_s: float) -> tuple[Row, ...]:
    encode, send, wait, receive, decode = np.diff(bounds, axis=1).T
    return (
        _row("RPC calls", _seconds(bounds[:, [0, -1]]), wall_s),
        _row("serialisation", encode + decode, wall_s),
        _row("send", send, wall_s),
        _row("on the wire", np.maximum(wait - _seconds(gpu), 0), wall_s),
        _row("receive", receive, wall_s),
    )


def _rows(names: Sequence[str], seconds: FloatArray, wall_s: float) -> tuple[Row, ...]:
    """One row a name, the longest total first."""
    by_name: dict[str, list[float]] = {}
    for name, lasted in zip(names, seconds.tolist(), strict=True):
        by_name.setdefault(name, []).append(lasted)
    rows = [_row(name, lasted, wall_s) for name, lasted in by_name.items()]
    return tuple(sorted(rows, key=lambda row: (-row.total_s, row.name)))


def _row(name: str, seconds: Iterable[float], wall_s: float) -> Row:
    lasted = list(seconds)
    total_s = math.fsum(lasted)
    return Row(name, len(lasted), total_s, total_s / max(len(lasted), 1), _share(total_s, wall_s))
