"""What a log of calls says: figures by method and phase, the bottleneck, and what to try."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import msgspec
import numpy as np

from asynctsqp.reports.advice import advise, traffic_of
from asynctsqp.reports.category import Category
from asynctsqp.reports.phases import PHASES, FloatArray, boundaries, claims
from asynctsqp.reports.records import RpcRecord

# The parts of a call that follow each other: its wait is the computation and the way there and back.
PARTS = {
    "encode": Category.SERIALISATION,
    "send": Category.MESSAGING,
    "on the way": Category.WIRE,
    "gpu": Category.GPU,
    "receive": Category.MESSAGING,
    "decode": Category.SERIALISATION,
}


class Phase(msgspec.Struct, frozen=True):
    """Of one phase over the calls of one method; percentiles are interpolated between the nearest two calls."""

    total_s: float
    average_s: float
    p50_s: float
    p99_s: float


class Method(msgspec.Struct, frozen=True):
    """The calls of one method. share: of the time of all calls, 0 to 1. mb_per_s: 10^6 bytes, both ways together,
    over the time that the calls took beyond the computation; 0 where they took none."""

    name: str
    calls: int
    bytes_sent: int
    bytes_received: int
    total_s: float
    share: float
    mb_per_s: float
    phases: dict[str, Phase]  # of phases.PHASES, "gpu" and "on the way": wait = gpu + on the way


class Bottleneck(msgspec.Struct, frozen=True):
    """The part of a call, and the method, with most of the time; the shares are of the time of all calls."""

    phase: str
    phase_share: float
    method: str
    method_share: float


class RpcReport(msgspec.Struct, frozen=True):
    """calls_s: added up over calls; wall_s: from the first call's start to the last one's end."""

    calls: int
    calls_s: float
    wall_s: float
    transports: dict[str, int]  # name -> calls
    methods: tuple[Method, ...]  # the longest total first
    bottleneck: Bottleneck
    advice: tuple[str, ...]


def report_of(rpcs: Sequence[RpcRecord]) -> RpcReport:
    """rpcs: at least one."""
    bounds = boundaries(rpcs)
    phases = _phases(rpcs)
    parts = {part: math.fsum(phases[part]) for part in PARTS}
    calls_s = math.fsum(parts.values())
    methods = [_method(name, which, rpcs, phases, calls_s) for name, which in _by_method(rpcs).items()]
    methods.sort(key=lambda method: (-method.total_s, method.name))
    return RpcReport(
        calls=len(rpcs),
        calls_s=calls_s,
        wall_s=float(bounds[:, -1].max() - bounds[:, 0].min()),
        transports=dict(Counter(rpc.transport for rpc in rpcs)),
        methods=tuple(methods),
        bottleneck=_bottleneck(parts, methods[0], calls_s),
        advice=advise(_categories(parts, calls_s), traffic_of(rpcs)),
    )


def _phases(rpcs: Sequence[RpcRecord]) -> dict[str, FloatArray]:
    """Seconds of each phase of each call."""
    rows = [(rpc.encode_s, rpc.send_s, rpc.wait_s, rpc.receive_s, rpc.decode_s) for rpc in rpcs]
    phases = dict(zip(PHASES, np.array(rows, np.float64).reshape(-1, len(PHASES)).T, strict=True))
    phases["gpu"] = np.clip(claims(rpcs)[:, 1], 0, phases["wait"])  # a claim: no longer than we waited
    phases["on the way"] = phases["wait"] - phases["gpu"]
    return phases


def _by_method(rpcs: Sequence[RpcRecord]) -> dict[str, list[int]]:
    """Method -> indices of its calls."""
    by_method: dict[str, list[int]] = {}
    for index, rpc in enumerate(rpcs):
        by_method.setdefault(rpc.method, []).append(index)
    return by_method


def _method(
    name: str, which: list[int], rpcs: Sequence[RpcRecord], phases: dict[str, FloatArray], calls_s: float
) -> Method:
    """which: indices of its calls."""
    shown = {phase: _phase(seconds[which]) for phase, seconds in phases.items()}
    total_s = math.fsum(shown[part].total_s for part in PARTS)
    sent = sum(rpcs[index].bytes_sent for index in which)
    received = sum(rpcs[index].bytes_received for index in which)
    beyond_s = math.fsum(shown[part].total_s for part in PARTS if part != "gpu")
    return Method(
        name=name,
        calls=len(which),
        bytes_sent=sent,
        bytes_received=received,
        total_s=total_s,
        share=_share(total_s, calls_s),
        mb_per_s=(sent + received) / 1e6 / beyond_s if beyond_s else 0.0,
        phases=shown,
    )


def _phase(seconds: FloatArray) -> Phase:
    p50, p99 = np.percentile(seconds, (50, 99))
    total_s = math.fsum(seconds)
    return Phase(total_s, total_s / len(seconds), float(p50), float(p99))


def _bottleneck(parts: dict[str, float], method: Method, calls_s: float) -> Bottleneck:
    phase = max(parts, key=lambda part: parts[part])
    return Bottleneck(phase, _share(parts[phase], calls_s), method.name, method.share)


def _categories(parts: dict[str, float], calls_s: float) -> dict[Category, float]:
    shares = dict.fromkeys(PARTS.values(), 0.0)
    for part, seconds in parts.items():
        shares[PARTS[part]] += _share(seconds, calls_s)
    return shares


def _share(seconds: float, of_s: float) -> float:
    return seconds / of_s if of_s else 0.0
