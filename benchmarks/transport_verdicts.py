"""What the figures of benchmarks.transport say about what was claimed before; nothing in here knows an answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.figures import CONFIDENCE, compare

# Of a tensor of 10 MB over the predecessor's msgpack messages, on its own machine: ms
SEED_BYTES = 10 << 20
SEED_MS = {"serialise": 7.5, "send": 1.9, "receive": 10.6, "deserialise": 1.2, "total": 21.2}

# Where the predecessor found the ratio of tcp to ipc: from LARGE_BYTES on, and below SMALL_BYTES (either way round)
LARGE_BYTES = 10 << 20
LARGE = "tcp and ipc differ by less than 2 % from 10 MiB on"
LARGE_ZONES = ((0.98, 1.02),)
SMALL_BYTES = 1 << 10
SMALL = "tcp and ipc differ by 10 to 100 times below 1 KiB"
SMALL_ZONES = ((0.01, 0.1), (10.0, 100.0))

TARGET_BYTES = 8 << 20  # written into and read out of shared memory in less than TARGET_MS
TARGET_MS = 1.0

Zones = tuple[tuple[float, float], ...]
Row = Mapping[str, Any]  # of results["sizes"], see benchmarks.transport


def ipc_against_tcp(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For both claims and both kinds of message: whether all sizes that it speaks of confirm it, or None.

    ratio: tcp's median round trip by ipc's; low, high: the sign test's interval of a round's ratio.
    """
    verdicts = []
    for kind in ("msgpack", "frame"):
        ratios = [_ratio(row, kind) for row in rows]
        large = [one for one in ratios if one["bytes"] >= LARGE_BYTES]
        small = [one for one in ratios if one["bytes"] < SMALL_BYTES]
        verdicts.append({"claim": LARGE, "messages": kind, **_verdict(large, LARGE_ZONES)})
        verdicts.append({"claim": SMALL, "messages": kind, **_verdict(small, SMALL_ZONES)})
    return verdicts


def _ratio(row: Row, kind: str) -> dict[str, float]:
    ways = row["ways"]
    rounds = [ways[f"{wire}-{kind}"]["round_trip_of_rounds_ms"] for wire in ("tcp", "ipc")]
    interval = compare(*rounds).interval
    ratio = ways[f"tcp-{kind}"]["round_trip_ms"] / ways[f"ipc-{kind}"]["round_trip_ms"]
    return {"bytes": row["bytes"], "ratio": ratio, **dataclasses.asdict(interval)}


def _verdict(ratios: Sequence[Mapping[str, float]], zones: Zones) -> dict[str, Any]:
    """By the ratios alone; certain where their intervals say the same: all inside a zone, or one outside of all.

    Fewer rounds than such an interval needs (six) make nothing certain.
    """
    if not ratios:
        return {"confirmed": None, "certain": False, "sizes": []}
    confirmed = all(any(low <= one["ratio"] <= high for low, high in zones) for one in ratios)
    inside = all(any(low <= one["low"] and one["high"] <= high for low, high in zones) for one in ratios)
    outside = any(all(one["high"] < low or high < one["low"] for low, high in zones) for one in ratios)
    enough = all(one["confidence"] >= CONFIDENCE for one in ratios)
    certain = enough and (inside if confirmed else outside)
    return {"confirmed": confirmed, "certain": certain, "sizes": list(ratios)}


def shared_memory(rows: Sequence[Row], alone: Mapping[str, float]) -> list[dict[str, Any]]:
    """write_ms and read_ms of TARGET_BYTES, and whether their sum is below TARGET_MS; None where not measured.

    alone: benchmarks.slot_copy's figures, of one process; the other verdict is of two processes that take turns.
    """
    between = [row["ways"]["shared-memory"] for row in rows if row["bytes"] == TARGET_BYTES]
    return [
        _copies("by one process", alone["write_ms"], alone["read_ms"]),
        _copies("by two processes in turn", between[0]["serialise_ms"], between[0]["deserialise_ms"])
        if between
        else _copies("by two processes in turn", None, None),
    ]


def _copies(who: str, write_ms: float | None, read_ms: float | None) -> dict[str, Any]:
    claim = f"{TARGET_BYTES >> 20} MiB go into and out of shared memory in less than {TARGET_MS:.0f} ms, {who}"
    confirmed = None if write_ms is None or read_ms is None else write_ms + read_ms < TARGET_MS
    return {"claim": claim, "confirmed": confirmed, "write_ms": write_ms, "read_ms": read_ms}
