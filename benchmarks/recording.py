"""What writing a call down costs: microseconds a call for --log-rpc, and for --stats or --trace.

    python -m benchmarks.recording [--records N] [--rounds N] [--out FILE]

Measured: making the record of a finished call and noting it, which is all that the product does more for each call
while it answers; and a timed operation of the TEE side beside one that is not. Medians over rounds, every kind in
each round, of the mean over many. `off` is what is left without these options: one comparison with None. Not
measured: what is made of the records after the answer, and a slow disk.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from asynctsqp.config import EngineOptions, OneLineParser
from asynctsqp.errors import AsynctsqpError
from asynctsqp.reports.records import RpcRecord
from benchmarks import machine
from benchmarks.cli import publish
from tee_side.recorder import Recorder

Work = Callable[[], None]


class Operation:
    """Has a method of a name that a recorder times, which does nothing."""

    def add(self) -> None:
        pass


def kinds(directory: Path) -> dict[str, Work]:
    """What is compared, by name."""
    log = Recorder(EngineOptions(log_rpc=str(directory / "rpc.jsonl")))
    keep = Recorder(EngineOptions(stats=True))
    plain, timed = Operation(), Operation()
    keep.watch(timed, lane=0)
    return {
        "call, off": _noting(None),
        "call, --log-rpc": _noting(log.note),
        "call, --stats or --trace": _noting(keep.note),
        "operation, off": lambda: plain.add(),
        "operation, --stats or --trace": lambda: timed.add(),
    }


def _noting(note: Callable[[RpcRecord], None] | None) -> Work:
    def work() -> None:
        if note is not None:
            note(_record())

    return work


def _record() -> RpcRecord:
    return RpcRecord(
        method="GATE_UP",
        layer=17,
        lane=0,
        slot=1,
        transport="doorbell",
        bytes_sent=2304,
        bytes_received=12288,
        start_at=time.perf_counter(),
        encode_s=5.2e-6,
        send_s=1.16e-5,
        wait_s=4.353e-4,
        receive_s=8.1e-6,
        decode_s=3.46e-5,
        gpu_start_at=time.perf_counter(),
        gpu_s=3.732e-4,
    )


def microseconds(work: Work, records: int) -> float:
    start = time.perf_counter()
    for _ in range(records):
        work()
    return (time.perf_counter() - start) / records * 1e6


def measure(records: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        compared = kinds(Path(directory))
        samples: dict[str, list[float]] = {name: [] for name in compared}
        for _ in range(rounds):
            for name, work in compared.items():
                samples[name].append(microseconds(work, records))
    return {name: {"median_us": statistics.median(values), "samples": values} for name, values in samples.items()}


def _show(results: dict[str, Any]) -> None:
    table = Table(title="cost of writing down", title_justify="left")
    table.add_column("one")
    table.add_column("us", justify="right")
    for name, figures in results.items():
        table.add_row(name, f"{figures['median_us']:.2f}")
    Console().print(table)


def main(words: Sequence[str] | None = None) -> int:
    parser = OneLineParser(prog="benchmarks.recording", description="What --log-rpc, --stats and --trace cost a call.")
    parser.add_argument("--records", type=int, default=50_000, metavar="N", help="a round (default: 50000)")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="(default: 9)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there too")
    arguments: argparse.Namespace = parser.parse_args(words)
    if min(arguments.records, arguments.rounds) < 1:
        parser.error("--records and --rounds are at least 1")
    try:
        report = {
            "benchmark": "recording",
            "machine": machine.describe(),
            "settings": {"records": arguments.records, "rounds": arguments.rounds},
            "results": measure(arguments.records, arguments.rounds),
        }
        _show(report["results"])
        publish(report, arguments.out)
    except (AsynctsqpError, OSError) as error:
        print(f"benchmarks.recording: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
