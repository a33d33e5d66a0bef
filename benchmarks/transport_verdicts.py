"""What the figures of benchmarks.transport say about what was claimed before; nothing in here knows an answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.figures import compare

# Of a tensor of 10 MB over the predecessor's msgpack messages, on its own machine: ms
SEED_BYTES = 10 << 20
SEED_MS = {"serialise": 7.5, "send": 1.9, "receive": 10.6, "deserialise": 1.2, "total": 21.2}

LARGE_BYTES = 10 << 20  # from here on ipc and tcp were found to differ by less than LARGE_DIFFERENCE
LARGE_DIFFERENCE = 0.02
SMALL_BYTES = 1 << 10  # below, by a factor of between LEAST_FACTOR and MOST_FACTOR
LEAST_FACTOR, MOST_FACTOR = 10.0, 100.0

TARGET_BYTES = 8 << 20  # written into and read out of shared memory in less than TARGET_MS
TARGET_MS = 1.0

Row = Mapping[str, Any]  # of results["sizes"], see benchmarks.transport


def ipc_against_tcp(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For both claims and both kinds of message: whether all sizes that the claim speaks of confirm it, or None.

    ratio: tcp's median round trip by ipc's; low, high: the sign test's interval of a round's ratio.
    """
    large = f"tcp and ipc differ by less than {LARGE_DIFFERENCE:.0%} from {LARGE_BYTES >> 20} MiB on"
    small = f"tcp and ipc differ by {LEAST_FACTOR:.0f} to {MOST_FACTOR:.0f} times below {SMALL_BYTES >> 10} KiB"
    verdicts = []
    for kind in ("msgpack", "frame"):
        ratios = [_ratio(row, kind) for row in rows]
        verdicts.append(_verdict(large, kind, [one for one in ratios if one["bytes"] >= LARGE_BYTES], _nearly_same))
        verdicts.append(_verdict(small, kind, [one for one in ratios if one["bytes"] < SMALL_BYTES], _far_apart))
    return verdicts


def _ratio(row: Row, kind: str) -> dict[str, float]:
    ways = row["ways"]
    rounds = [ways[f"{wire}-{kind}"]["round_trip_of_rounds_ms"] for wire in ("tcp", "ipc")]
    interval = compare(*rounds).interval
    ratio = ways[f"tcp-{kind}"]["round_trip_ms"] / ways[f"ipc-{kind}"]["round_trip_ms"]
    return {"bytes": row["bytes"], "ratio": ratio, "low": interval.low, "high": interval.high}


def _verdict(
    claim: str, kind: str, ratios: Sequence[dict[str, float]], holds: Callable[[float], bool]
) -> dict[str, Any]:
    confirmed = all(holds(one["ratio"]) for one in ratios) if ratios else None
    return {"claim": claim, "messages": kind, "confirmed": confirmed, "sizes": list(ratios)}


def _nearly_same(ratio: float) -> bool:
    return abs(ratio - 1) < LARGE_DIFFERENCE


def _far_apart(ratio: float) -> bool:
    return LEAST_FACTOR <= max(ratio, 1 / ratio) <= MOST_FACTOR


def shared_memory(rows: Sequence[Row]) -> dict[str, Any]:
    """write_ms and read_ms of TARGET_BYTES, and whether their sum is below TARGET_MS; None where not measured."""
    claim = f"{TARGET_BYTES >> 20} MiB are written to and read from shared memory in less than {TARGET_MS:.0f} ms"
    for row in rows:
        if row["bytes"] == TARGET_BYTES:
            way = row["ways"]["shared-memory"]
            write, read = way["serialise_ms"], way["deserialise_ms"]
            return {"claim": claim, "confirmed": write + read < TARGET_MS, "write_ms": write, "read_ms": read}
    return {"claim": claim, "confirmed": None, "write_ms": None, "read_ms": None}
