"""What the product's own compression makes of recorded payloads, how long it takes, and from which link on it pays."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from asynctsqp.compression import LEAST_BYTES, Compression
from asynctsqp.model_spec import Op
from benchmarks.compression_recorder import Payload

CODECS = ("lz4", "zstd")
PREFILL = (Op.QKV, Op.O, Op.GATE_UP, Op.DOWN)  # the lm_head's one row is never compressed


@dataclass(frozen=True)
class Cost:
    """Of one or many payloads. pack_s, unpack_s: 0 where there is nothing to do."""

    raw: float  # bytes
    packed: float
    pack_s: float
    unpack_s: float

    @property
    def breakeven_bits_per_s(self) -> float | None:
        """The link on which the bytes that are saved take as long as saving them; None where none are."""
        spent = self.pack_s + self.unpack_s
        return 8 * (self.raw - self.packed) / spent if self.packed < self.raw and spent else None

    def figures(self) -> dict[str, float | None]:
        bits = self.breakeven_bits_per_s
        return {"ratio": self.raw / self.packed, "breakeven_gbit_s": None if bits is None else bits / 1e9}


def measure(payloads: Sequence[Payload], dtype_bytes: int) -> list[dict[str, Any]]:
    """A row for each operation and direction; bytes and times are those of a whole pass."""
    rows: dict[tuple[Op, str], list[Payload]] = {}
    for payload in payloads:
        rows.setdefault((payload.op, payload.direction), []).append(payload)
    return [_row(op, direction, of_row, dtype_bytes) for (op, direction), of_row in rows.items()]


def prefill(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """All of a prefill's operations, both ways, one after the other."""
    names = {op.name for op in PREFILL}
    counted = [row for row in rows if row["op"] in names]
    totals = {codec: _sum([Cost(**row["costs"][codec]) for row in counted]) for codec in CODECS}
    raw = sum(row["bytes"] for row in counted)
    return {"bytes": raw, "codecs": {codec: total.figures() for codec, total in totals.items()}}


def _row(op: Op, direction: str, payloads: Sequence[Payload], itemsize: int) -> dict[str, Any]:
    found = {codec: _of_row(Compression(codec), payloads, itemsize) for codec in CODECS}
    return {
        "op": op.name,
        "direction": direction,
        "bytes": sum(payload.raw.nbytes * payload.weight for payload in payloads),
        "payload_bytes": max(payload.raw.nbytes for payload in payloads),
        "compressed": any(payload.raw.nbytes > LEAST_BYTES for payload in payloads),
        "costs": {codec: vars(cost) for codec, (cost, _) in found.items()},
        "codecs": {codec: cost.figures() | speeds for codec, (cost, speeds) in found.items()},
    }


def _of_row(
    compression: Compression, payloads: Sequence[Payload], itemsize: int
) -> tuple[Cost, dict[str, float | None]]:
    """All of them; and of each, the median speeds in MB/s of raw bytes, None where nothing is compressed.

    Payloads of one row differ by a row of the tensor at most, so that the median time stands for each that takes any.
    """
    _one(compression, payloads[0], itemsize)  # the library's first call is slower
    each = [_one(compression, payload, itemsize) for payload in payloads]
    weights = [payload.weight for payload in payloads]
    whole = Cost(
        raw=sum(one.raw * weight for one, weight in zip(each, weights, strict=True)),
        packed=sum(one.packed * weight for one, weight in zip(each, weights, strict=True)),
        pack_s=_total([one.pack_s for one in each], weights),
        unpack_s=_total([one.unpack_s for one in each], weights),
    )
    speeds = {
        "pack_mb_s": _median([one.raw / one.pack_s / 1e6 for one in each if one.pack_s]),
        "unpack_mb_s": _median([one.raw / one.unpack_s / 1e6 for one in each if one.unpack_s]),
    }
    return whole, speeds


def _one(compression: Compression, payload: Payload, itemsize: int) -> Cost:
    raw = payload.raw
    if raw.nbytes <= LEAST_BYTES:
        return Cost(raw.nbytes, raw.nbytes, 0.0, 0.0)
    start = time.perf_counter()
    packed = memoryview(compression.pack(raw, itemsize))
    pack_s = time.perf_counter() - start
    if packed.nbytes == raw.nbytes:  # compressed in vain: the receiver takes it as it is
        return Cost(raw.nbytes, raw.nbytes, pack_s, 0.0)
    start = time.perf_counter()
    compression.unpack(packed, raw.nbytes, itemsize)
    return Cost(raw.nbytes, packed.nbytes, pack_s, time.perf_counter() - start)


def _total(seconds: Sequence[float], weights: Sequence[float]) -> float:
    """The median of those that take any time, as often as there are such."""
    spent = [(one, weight) for one, weight in zip(seconds, weights, strict=True) if one]
    return (_median([one for one, _ in spent]) or 0.0) * sum(weight for _, weight in spent)


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _sum(costs: Sequence[Cost]) -> Cost:
    return Cost(*(sum(getattr(cost, name) for cost in costs) for name in ("raw", "packed", "pack_s", "unpack_s")))
