"""The figures of benchmarks.transport on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.transport_exchange import STEPS
from benchmarks.transport_verdicts import SEED_BYTES, SEED_MS

WORDS = {True: "confirmed", False: "refuted", None: "not measured"}


def show(report: Mapping[str, Any], console: Console) -> None:
    """Opens with the floor, by which every row can be judged."""
    results = report["results"]
    rate = results["memcpy_bytes_per_s"]
    console.print(
        f"floor: one thread's memcpy of {results['memcpy_bytes'] >> 20} MiB, {rate / 1e9:.1f} GB/s, which is "
        f"{SEED_BYTES / rate * 1e3:.2f} ms for {SEED_BYTES >> 20} MiB (what lies in a cache may go faster)",
        soft_wrap=True,
        highlight=False,
    )
    console.print(machine.summary(report["machine"]), highlight=False, soft_wrap=True)
    console.print(_times(results))
    console.print(_control(results["control"]))
    for line in _verdicts(results):
        console.print(line, highlight=False, soft_wrap=True)


def _times(results: Mapping[str, Any]) -> Table:
    table = Table("tensor", "way", title="one tensor to another process: medians, ms", title_justify="left")
    for heading in (*STEPS, "memcpys", "round trip"):
        table.add_column(heading, justify="right")
    for row in results["sizes"]:
        floor_ms = row["bytes"] / results["memcpy_bytes_per_s"] * 1e3
        for name, way in row["ways"].items():
            steps = (milliseconds(way[f"{step}_ms"]) for step in STEPS)
            total = f"{way['total_ms'] / floor_ms:.1f}"
            table.add_row(size(row["bytes"]), name, *steps, total, milliseconds(way["round_trip_ms"]))
        if row["bytes"] == SEED_BYTES:
            table.add_row(size(SEED_BYTES), "the predecessor", *(f"{SEED_MS[step]:.1f}" for step in STEPS), "-", "-")
        table.add_section()
    return table


def _control(rows: list[dict[str, Any]]) -> Table:
    table = Table("control header", title="the header of one call", title_justify="left")
    for heading in ("bytes", "encode, µs", "decode, µs"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(row["format"], str(row["bytes"]), f"{row['encode_us']:.2f}", f"{row['decode_us']:.2f}")
    return table


def _verdicts(results: Mapping[str, Any]) -> Iterator[str]:
    for one in results["ipc_against_tcp"]:
        found = "; ".join(
            f"{size(int(each['bytes']))}: tcp/ipc {each['ratio']:.3f} (rounds: {each['low']:.3f} to {each['high']:.3f})"
            for each in one["sizes"]
        )
        doubt = (
            ""
            if one["certain"] or one["confirmed"] is None
            else " (but the rounds are too few or scatter too much to be sure)"
        )
        yield f"{WORDS[one['confirmed']]}{doubt}, {one['messages']} messages: {one['claim']}. {found}"
    for slot in results["shared_memory"]:
        found = "" if slot["confirmed"] is None else f"{slot['write_ms']:.2f} + {slot['read_ms']:.2f} ms"
        yield f"{WORDS[slot['confirmed']]}: {slot['claim']}. {found}"


def size(count: int) -> str:
    """All sizes here are whole bytes, KiB or MiB."""
    for unit, shift in (("MiB", 20), ("KiB", 10)):
        if count >= 1 << shift:
            return f"{count >> shift} {unit}"
    return f"{count} B"


def milliseconds(value: float) -> str:
    """To the microsecond where that is something."""
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"
