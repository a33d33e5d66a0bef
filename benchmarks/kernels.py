"""What one row of the TEE side's non-linear parts takes, in numpy and in torch, with warm caches and with cold ones.

    python -m benchmarks.kernels [--calls N] [--out FILE]

One thread, shapes of SmolLM2-135M, a context of 64 tokens. Warm: a loop over nothing else. Cold: before each call, a
layer's largest product (7 MB of weights, which then fill the caches) on this very thread, not in the time.
Medians of --calls calls, in microseconds. few_rows.py and many_rows.py are the project's own; nothing else is compared.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from asynctsqp.config import OneLineParser
from asynctsqp.errors import BadInputError
from benchmarks import machine
from benchmarks.cli import ending, publish
from tee_side import attention, few_rows, many_rows

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, KEYS = 576, 1536, 9, 3, 64, 64

Kernel = Callable[[], object]


def pairs() -> dict[str, tuple[Kernel, Kernel]]:
    """Each operation in numpy and in torch, on the same arrays."""
    generator = np.random.default_rng(0)

    def rows(*shape: int) -> Any:
        return generator.standard_normal(shape).astype(np.float32)

    x, weight, gate_up = rows(1, HIDDEN), rows(HIDDEN), rows(1, 2 * INTERMEDIATE)
    heads, cos, sin = rows(1, HEADS + KV_HEADS, HEAD_DIM), rows(1, 1, HEAD_DIM), rows(1, 1, HEAD_DIM)
    q, run = rows(1, HEADS, HEAD_DIM), (rows(KV_HEADS, KEYS, HEAD_DIM), rows(KV_HEADS, KEYS, HEAD_DIM))
    tensors = [torch.from_numpy(part) for part in (q.reshape(KV_HEADS, -1, HEAD_DIM), *run)]
    zero = np.zeros_like(x)
    return {
        "rms_norm": (
            lambda: few_rows.rms_norm(x, weight, 1e-5),
            lambda: many_rows.rms_norm(x, weight, 1e-5),
        ),
        "rotate": (lambda: few_rows.rotate(heads, cos, sin), lambda: many_rows.rotate(heads, cos, sin)),
        "attend": (
            lambda: list(attention.attend(q, [], run, whole=True)),
            lambda: attention.merge([attention.flash_of_one(*tensors)]),
        ),
        "silu_mul": (lambda: few_rows.silu_mul(gate_up), lambda: many_rows.silu_mul(gate_up)),
        "add": (lambda: few_rows.add(x, zero), lambda: many_rows.add(x, zero)),
    }


def measure(kernel: Kernel, calls: int) -> dict[str, float]:
    weights, x = torch.randn(8, 2 * INTERMEDIATE, HIDDEN), torch.randn(HIDDEN)
    y = torch.empty(2 * INTERMEDIATE)
    times: dict[str, list[float]] = {"warm_us": [], "cold_us": []}
    for _ in range(calls):
        times["warm_us"].append(_timed(kernel))
    for number in range(calls):
        torch.mv(weights[number % len(weights)], x, out=y)
        times["cold_us"].append(_timed(kernel))
    return {name: statistics.median(samples) for name, samples in times.items()}


def _timed(kernel: Kernel) -> float:
    start = time.perf_counter()
    kernel()
    return (time.perf_counter() - start) * 1e6


def _print(report: dict[str, Any], out: Path | None) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(machine.summary(report["machine"]), highlight=False, soft_wrap=True)
    table = Table(title="one row, microseconds", title_justify="left")
    for heading in ("operation", "numpy, warm", "cold", "torch, warm", "cold"):
        table.add_column(heading, justify="right")
    for name, row in report["results"].items():
        figures = (row[way][heat] for way in ("numpy", "torch") for heat in ("warm_us", "cold_us"))
        table.add_row(name, *(f"{figure:.1f}" for figure in figures))
    console.print(table)
    publish(report, out)


def main(words: Sequence[str] | None = None) -> int:
    parser = OneLineParser(prog="benchmarks.kernels", description="Few rows in numpy and in torch, warm and cold.")
    parser.add_argument("--calls", type=int, default=1000, metavar="N", help="of each (default: 1000)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there too")
    arguments: argparse.Namespace = parser.parse_args(words)
    with ending("benchmarks.kernels") as end, np.errstate(all="ignore"):
        if arguments.calls < 1:
            raise BadInputError("--calls is at least 1")
        torch.set_num_threads(1)
        described = machine.describe()
        results = {
            name: {way: measure(kernel, arguments.calls) for way, kernel in zip(("numpy", "torch"), both, strict=True)}
            for name, both in pairs().items()
        }
        settings = {"calls": arguments.calls, "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS")}
        report = {"benchmark": "kernels", "machine": described, "settings": settings, "results": results}
        _print(report, arguments.out)
    return end.code


if __name__ == "__main__":
    sys.exit(main())
