"""What moving a tensor between two processes costs.

    python -m benchmarks.transport [--rounds N] [--largest BYTES] [--threads N] [--out FILE] [--plot FILE]

A parent and a child process that echoes, float32 tensors of 256 bytes to 64 MiB, and the five ways of
benchmarks.transport_ways: msgpack messages and raw frames, each over ZeroMQ's ipc and tcp (loopback), and the project's
shared memory. Medians, in ms, of the way from the parent to the child:

- serialise: from the tensor to what the transport takes; for shared memory the copy into the slot.
- send: until the transport's call returns (ZeroMQ goes on sending in a thread of its own), or until the child has
  the message, which may be earlier where the parent loses its core to the child.
- receive: from there until the child has the message in hand.
- deserialise: until the child has a tensor whose values the parent cannot change; for shared memory the copy out.
- total: all four, exchange by exchange: its median is not the sum of theirs.
- round trip: until the parent has the tensor that the child sent back the same way.

Both processes read CLOCK_MONOTONIC, which is one clock on a machine, so their times are compared as they are. The ways
take turns, A B C A B C, `--rounds` times for each size; in each turn the first exchange is checked, and not counted.
Sockets are blocking, without an event loop; shared memory is announced by a header over ipc, without the doorbell.
Copies use --threads threads, as many as the product's own by default, with the product's OpenMP settings: idle ones
sleep instead of spinning on the other process's cores. On a busy machine several threads copy no faster than one.

"memcpys" in the table is the total in units of the floor: one thread's memcpy at the rate measured for 64 MiB.

The predecessor's row is what it measured on its own machine; it stands there for the proportions. Not measured: a
network, several tensors on their way at once, casts, compression, masks, a GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import os
import statistics
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asynctsqp.cores import default_threads, openmp

os.environ.update(openmp())  # read when torch is imported, below

import numpy as np
import torch
import zmq
from rich.console import Console

from asynctsqp.config import OneLineParser
from asynctsqp.errors import BadInputError
from benchmarks import control_formats, machine, transport_verdicts
from benchmarks.cli import Step, ending, publish, steps
from benchmarks.slot_copy import slot_copy
from benchmarks.transport_exchange import STEPS, Echo, echo
from benchmarks.transport_table import show, size
from benchmarks.transport_ways import NAMES, ROW_BYTES

MIB = 1 << 20
SIZES = (*(ROW_BYTES << shift for shift in range(0, 16, 2)), 8 * MIB, 10 * MIB, 16 * MIB, 64 * MIB)
MEMCPY_BYTES = 64 * MIB
MEMCPY_TIMES = 7
COPIES = 20  # a round, by one process alone
CONTROL_ROUNDS = 3  # at least: a batch takes milliseconds

Sample = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Settings:
    """rounds: turns of every way; largest: bytes of a tensor; threads: of torch in either process, for copies."""

    rounds: int
    largest: int
    threads: int


def run(settings: Settings) -> dict[str, Any]:
    """All results. Raises SharedMemoryError, WorkerFailed, zmq.ZMQError."""
    sizes = [count for count in SIZES if count <= settings.largest]
    rate = memcpy_bytes_per_s()
    torch.set_num_threads(settings.threads)
    with echo(sizes[-1], settings.threads) as both, steps(len(sizes)) as step:
        rows = [_row(both, count, settings.rounds, step) for count in sizes]
    return {
        "memcpy_bytes": MEMCPY_BYTES,
        "memcpy_bytes_per_s": rate,
        "sizes": rows,
        "predecessor_ms": {"bytes": transport_verdicts.SEED_BYTES, **transport_verdicts.SEED_MS},
        "ipc_against_tcp": transport_verdicts.ipc_against_tcp(rows),
        "shared_memory": transport_verdicts.shared_memory(
            rows, slot_copy(transport_verdicts.TARGET_BYTES, COPIES * settings.rounds)
        ),
        "control": control_formats.measure(max(CONTROL_ROUNDS, settings.rounds)),
    }


def memcpy_bytes_per_s() -> float:
    """Of the C library's, one thread, in memory that was touched before: the fastest of MEMCPY_TIMES."""
    source, target = np.ones(MEMCPY_BYTES, np.uint8), np.ones(MEMCPY_BYTES, np.uint8)
    spans = []
    for _ in range(MEMCPY_TIMES):
        began = time.perf_counter()
        ctypes.memmove(target.ctypes.data, source.ctypes.data, MEMCPY_BYTES)
        spans.append(time.perf_counter() - began)
    return MEMCPY_BYTES / min(spans)


def _row(both: Echo, count: int, rounds: int, step: Step) -> dict[str, Any]:
    """One size."""
    step(size(count))
    turns: dict[str, list[list[Sample]]] = {name: [] for name in NAMES}
    for _ in range(rounds):
        for name in NAMES:
            turns[name].append(both.samples(name, count, _exchanges(count)))
    return {"bytes": count, "ways": {name: _figures(of_way) for name, of_way in turns.items()}}


def _exchanges(count: int) -> int:
    """In one turn: what is short needs more for a steady median."""
    return max(3, min(30, 4 * MIB // count))


def _figures(turns: Sequence[Sequence[Sample]]) -> dict[str, Any]:
    samples = [sample for turn in turns for sample in turn]
    medians = {f"{key}_ms": statistics.median(one[key] for one in samples) for key in (*STEPS, "round_trip")}
    of_rounds = [statistics.median(one["round_trip"] for one in turn) for turn in turns]
    return {**medians, "samples": len(samples), "round_trip_of_rounds_ms": of_rounds}


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="benchmarks.transport", description="What moving a tensor between processes costs.")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="(default: 7)")
    parser.add_argument(
        "--largest", type=int, default=SIZES[-1], metavar="BYTES", help=f"tensors up to this (default: {SIZES[-1]})"
    )
    parser.add_argument(
        "--threads", type=int, default=default_threads(), metavar="N", help="of either process (default: chosen)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw total time against size (png, svg or pdf)")
    return parser


def _settings(arguments: argparse.Namespace) -> Settings:
    if arguments.rounds < 1 or arguments.threads < 1:
        raise BadInputError("--rounds and --threads are at least 1")
    if arguments.largest < SIZES[0]:
        raise BadInputError(f"--largest is at least {SIZES[0]}")
    return Settings(arguments.rounds, arguments.largest, arguments.threads)


def _report(settings: Settings) -> dict[str, Any]:
    described = machine.describe()
    results = run(settings)
    return {
        "benchmark": "transport",
        "machine": described,
        "settings": dataclasses.asdict(settings),
        "results": results,
    }


def _print(report: Mapping[str, Any], out: Path | None, plot: Path | None) -> None:
    show(report, Console(width=None if sys.stdout.isatty() else 120))
    publish(report, out)
    if plot is not None:
        from benchmarks.transport_plot import draw  # matplotlib takes longer to load than a short run

        draw(report["results"], plot)


def main(words: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(words)
    # nobody writes into the tensors that are made over messages
    warnings.filterwarnings("ignore", message="The given buffer is not writable")
    with ending("benchmarks.transport", zmq.ZMQError, ValueError) as end:
        _print(_report(_settings(arguments)), arguments.out, arguments.plot)
    return end.code


if __name__ == "__main__":
    sys.exit(main())
