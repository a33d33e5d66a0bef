"""What one call costs beside the computing: round trips in microseconds, the project's and the least possible.

    python -m benchmarks.rpc [--model MODEL] [--calls N] [--rounds N] [--limit-s N] [--out FILE]

Two processes on this machine, an asking and an answering one; five ways, by turns, --calls (3000) each:

- doorbell: the project's own call of a decode step's size (one row through q|k|v), from the tensor that is given to
  the tensor that comes back: its cast into the slot, the descriptor through the ring, the GPU side's checks, its answer
  through the other ring, the copy out of the slot. The GPU side is the project's server over a device that computes
  nothing, at once. The aim is a median of 20 us, where both sides have a core.
- messages: the same with the doorbell off: descriptors are messages of ZeroMQ, tensors lie in shared memory all the
  same.
- zmq: bare zmq.asyncio, DEALER to ROUTER, messages of the same size with nothing in them.
- spin: a word of shared memory each way, looked at without a pause, and no event loop.
- spin-loop: the same with a turn of the event loop after each look in vain.

All ends run on uvloop, one thread each. Percentiles are of all calls of all rounds; `over spin-loop` is what a way adds
to what two processes on event loops need at least. Each turn opens with calls that do not count. Rounds are taken until
--rounds of them were quiet (others took at most 5 % of the cores), or --limit-s are over.

Not measured: computing, several calls at once, tensors of a prefill, a network.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.config import OneLineParser
from asynctsqp.errors import BadInputError
from benchmarks import demo_model, machine
from benchmarks.cli import Step, ending, publish, steps
from benchmarks.contenders import Answer, openmp_added
from benchmarks.harness import PATIENCE_S, Worker
from benchmarks.rounds import alternate, how_quiet, percentile, used, verdict
from benchmarks.turns import Limits

AIM_US = 20.0
AIMED = "doorbell"
LEAST = "spin-loop"
WAYS = (AIMED, "messages", "zmq", "spin", LEAST)


def run(model: str, calls: int, limits: Limits, step: Step) -> dict[str, Any]:
    with Worker(
        "the asking side", "benchmarks.rpc_worker", openmp_added(), min(PATIENCE_S, limits.seconds / 10)
    ) as worker:
        step("loading")
        sizes = worker.ask("load", model=model)["bytes"]
        worker.sleep()
        rounds = alternate(WAYS, lambda way: worker.measure("trips", way=way, count=calls), limits, step)
    chosen = used(rounds)
    ways = {way: _figures([taken[way] for taken in chosen]) for way in WAYS}
    least = ways[LEAST]["p50_us"]
    for figures in ways.values():
        figures["over_least_us"] = figures["p50_us"] - least
    said = verdict(ways[AIMED]["p50_us"] <= AIM_US, chosen)
    return {"ways": ways, "message_bytes": sizes, "verdict": said, **how_quiet(rounds)}


def _figures(answers: Sequence[Answer]) -> dict[str, Any]:
    """Of one way. calls: that the GPU side has answered by the end, warm-up and the ways before this one included."""
    everything = [each for answer in answers for each in answer["ns"]]
    return {
        "p50_us": percentile(everything, 50) / 1e3,
        "p99_us": percentile(everything, 99) / 1e3,
        "round_trips": len(everything),
        "calls": answers[-1]["calls"],
        "p50_of_rounds_us": [percentile(answer["ns"], 50) / 1e3 for answer in answers],
    }


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="benchmarks.rpc", description="What one call costs beside the computing.")
    parser.add_argument("--model", metavar="MODEL", help="a checkpoint, or random:NAME (default: the demo model)")
    parser.add_argument("--calls", type=int, default=3000, metavar="N", help="of each way a round (default: 3000)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="(default: 7)")
    parser.add_argument("--limit-s", type=float, default=60, metavar="N", help="for the rounds (default: 60)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there too")
    return parser


def _report(arguments: argparse.Namespace) -> dict[str, Any]:
    if min(arguments.calls, arguments.rounds) < 1:
        raise BadInputError("--calls and --rounds are at least 1")
    model = arguments.model or str(demo_model.prepare())
    Checkpoint.find(model)  # a wrong name is known at once
    limits = Limits(arguments.rounds, arguments.limit_s)
    settings = {"model": model, "calls": arguments.calls, **dataclasses.asdict(limits)}
    described = machine.describe()
    with steps(1 + limits.rounds) as step:
        results = run(model, arguments.calls, limits, step)
    return {
        "benchmark": "rpc",
        "machine": described,
        "settings": settings,
        "aim": {"way": AIMED, "p50_us": AIM_US},
        "results": results,
    }


def _print(report: Mapping[str, Any], out: Path | None) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(machine.summary(report["machine"]), highlight=False, soft_wrap=True)
    console.print(_table(report["results"]))
    publish(report, out)


def _table(results: Mapping[str, Any]) -> Table:
    there, back = results["message_bytes"]
    quiet = f"{results['quiet_rounds']} of {results['rounds']} rounds quiet"
    table = Table("way", title=f"round trips, {there} and {back} bytes, {quiet}", title_justify="left")
    for heading in ("p50, us", "p99, us", f"over {LEAST}, us", "round trips", "aim, us"):
        table.add_column(heading, justify="right")
    aim = f"{AIM_US:.0f}: {results['verdict']}"
    for way, row in results["ways"].items():
        times = (f"{row[key]:.1f}" for key in ("p50_us", "p99_us", "over_least_us"))
        table.add_row(way, *times, str(row["round_trips"]), aim if way == AIMED else "")
    return table


def main(words: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(words)
    with ending("benchmarks.rpc", demo_model.DemoModelError) as end:
        _print(_report(arguments), arguments.out)
    return end.code


if __name__ == "__main__":
    sys.exit(main())
