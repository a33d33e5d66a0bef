"""How much of the GPU side's time the TEE side's own work hides, by the number of lanes.

    python -m benchmarks.overlap [--model MODEL] [--dtype DTYPE] [--lanes N]... [--prompt-tokens N] [--chunk-tokens N]
                                 [--sequences N] [--steps N] [--by products|calls] [--threads N]
                                 [--rounds N] [--limit-s N] [--out FILE]

The TEE side is the project's own, with its transport and its doorbell. The GPU side is the project's server over a
device of a set speed (benchmarks.timed_gpu): its calls take a set time, one after another whatever their lane, in which
nothing is computed. --by products (the default) shares the device's time out by multiplications, as where computing
takes the time; --by calls gives each call the same, as where reading the weights does. Three kinds of work:

- prompts: --sequences requests at once (16), each a prompt of one chunk, until the last one's first token. All chunks
  are the same work, so that nothing but the overlap is seen.
- prefill: a prompt of --prompt-tokens random tokens (1024), cut into chunks of --chunk-tokens (128), until the first
  token of its answer. Chunks are what the lanes have in flight; the first ones take the TEE side less than the device,
  the last ones more.
- decode: --sequences requests at once (16), prompts of 16 random tokens, until the last of the --steps tokens (16)
  that follow each first one. The requests are shared out over two lanes at most (tee_side/room.py).

For each, first the TEE side's own time is measured: one lane, products that take no time. Messages, wake-ups and what
the server does for a call are in it. Then the speed is set so that the device's time is as long, and rounds begin:
the TEE side's own time again, and each of --lanes (1, 2, 4, 8). Medians, and their ratio to one lane's, round by
round: the aim is at most 0.6 from two lanes on. `of sum` is the time as a part of the sum of both sides' times with one
lane: what is above 1 there is lost to waking up, and makes the ratio to one lane look better. `ideal`, in the same
unit, is the larger of the two times: nothing but the busier side is ever waited for.

No schedule of few lanes need reach the ideal: a lane's steps are of different lengths, and two lanes that take turns
wait for each other's longer ones. In decode two lanes are two batches, so twice the calls: more work for the TEE side,
and with --by calls for the device too, whose time in all, `device` in the table, is what the ideal is made from.

Not measured: a GPU, its transfers, a network. The GPU side looks for a product's end once a turn of its loop, as for a
GPU's; `late` is how long after the end it has seen it (median). The default of --threads leaves a core to its polling.
Rounds are taken until --rounds of them were quiet (others took at most 5 % of the cores), or --limit-s, of one kind of
work, are over.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.config import OneLineParser
from asynctsqp.cores import cores
from asynctsqp.errors import BadInputError
from asynctsqp.limits import MAX_LANES, WIRE_DTYPE_NAMES
from benchmarks import demo_model, machine
from benchmarks.cli import Step, ending, publish, steps
from benchmarks.contenders import Answer, openmp_added
from benchmarks.figures import compare
from benchmarks.harness import PATIENCE_S, Worker
from benchmarks.rounds import alternate, how_quiet, used, verdict
from benchmarks.turns import Limits

AIM = 0.6  # of one lane's time
LANES = (1, 2, 4, 8)
DECODE_PROMPT_TOKENS = 16
BY = ("products", "calls")
OWN = 0  # in the place of a number of lanes: one lane, and products that take no time
ONE = 1
CALIBRATIONS = 3


@dataclass(frozen=True)
class Work:
    """What is asked of the engine at once."""

    name: str
    prompts: list[list[int]]
    new_tokens: int


@dataclass(frozen=True)
class Settings:
    """by: what shares the device's time out; threads: of the TEE side; limits: of one kind of work."""

    model: str
    dtype: str
    lanes: tuple[int, ...]
    prompt_tokens: int
    chunk_tokens: int
    sequences: int
    steps: int
    by: str
    threads: int
    limits: Limits

    def works(self, vocab_size: int) -> tuple[Work, ...]:
        """Of always the same tokens."""
        seeded = random.Random(0)

        def prompt(tokens: int) -> list[int]:
            return [seeded.randrange(vocab_size) for _ in range(tokens)]

        decoding = [prompt(DECODE_PROMPT_TOKENS) for _ in range(self.sequences)]
        short = [prompt(self.chunk_tokens) for _ in range(self.sequences)]
        return (
            Work("prompts", short, 1),
            Work("prefill", [prompt(self.prompt_tokens)], 1),
            Work("decode", decoding, 1 + self.steps),
        )


class Sides:
    """Both, in the worker's tree of processes."""

    def __init__(self, worker: Worker, settings: Settings) -> None:
        self._worker = worker
        self.by = settings.by

    def measure(self, work: Work, lanes: int, seconds_each: float) -> Answer:
        """seconds_each: of what the device's time is shared out by."""
        return self._worker.measure(
            "work",
            lanes=lanes,
            prompts=work.prompts,
            new_tokens=work.new_tokens,
            call_s=seconds_each if self.by == "calls" else 0.0,
            product_s=seconds_each if self.by == "products" else 0.0,
        )


def run(settings: Settings, works: Sequence[Work], step: Step) -> list[dict[str, Any]]:
    """All kinds of work."""
    limits = settings.limits
    with Worker(
        "the TEE side", "benchmarks.overlap_worker", openmp_added(), min(PATIENCE_S, limits.seconds / 20)
    ) as worker:
        step("loading")
        worker.ask(
            "load",
            model=settings.model,
            dtype=settings.dtype,
            lanes=settings.lanes,
            chunk_tokens=settings.chunk_tokens,
            threads=settings.threads,
        )
        worker.sleep()
        return [_result(Sides(worker, settings), work, settings.lanes, limits, step) for work in works]


def _result(sides: Sides, work: Work, lanes: Sequence[int], limits: Limits, step: Step) -> dict[str, Any]:
    step(f"{work.name}: the TEE side's own time")
    for count in lanes:  # cold so far
        sides.measure(work, count, 0.0)
    own = [sides.measure(work, ONE, 0.0) for _ in range(min(CALIBRATIONS, limits.rounds))]
    seconds_each = statistics.median(answer["seconds"] for answer in own) / own[0]["gpu"][sides.by]

    def measure(count: int) -> Answer:
        return sides.measure(work, ONE, 0.0) if count == OWN else sides.measure(work, count, seconds_each)

    rounds = alternate([OWN, *lanes], measure, limits, lambda text: step(f"{work.name}: {text}"))
    chosen = used(rounds)
    own_s = _median(chosen, OWN)
    return {
        "work": work.name,
        "own_s": own_s,
        "lanes": [_figures(chosen, count, own_s, sides.by, seconds_each) for count in lanes],
        **how_quiet(rounds),
        "samples": [{count or "own": answer["seconds"] for count, answer in taken.items()} for taken in rounds],
    }


def _figures(
    rounds: Sequence[Mapping[int, Answer]], lanes: int, own_s: float, by: str, seconds_each: float
) -> dict[str, Any]:
    """Of one number of lanes. device_s: what the calls are set to take, in all."""
    comparison = compare([taken[lanes]["seconds"] for taken in rounds], [taken[ONE]["seconds"] for taken in rounds])
    gpu, of_one = rounds[-1][lanes]["gpu"], rounds[-1][ONE]["gpu"]
    device_s = gpu[by] * seconds_each
    sum_s = own_s + of_one[by] * seconds_each
    late = [late for taken in rounds for late in taken[lanes]["gpu"]["late_s"]]
    return {
        "lanes": lanes,
        "seconds": comparison.ours_median,
        "ratio": comparison.ratio,
        "interval": dataclasses.asdict(comparison.interval),
        "of_sum": comparison.ours_median / sum_s,
        "ideal": max(own_s, device_s) / sum_s,
        "device_s": device_s,
        "late_us": 1e6 * statistics.median(late),
        "calls": gpu["calls"],
        "products": gpu["products"],
        "verdict": verdict(comparison.ratio <= AIM, rounds) if lanes > ONE else "",
    }


def _median(rounds: Sequence[Mapping[int, Answer]], lanes: int) -> float:
    return float(statistics.median(taken[lanes]["seconds"] for taken in rounds))


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="benchmarks.overlap", description="What several lanes hide of the GPU side's time.")
    parser.add_argument("--model", metavar="MODEL", help="a checkpoint, or random:NAME (default: the demo model)")
    parser.add_argument("--dtype", choices=WIRE_DTYPE_NAMES, default="float32", help="(default: float32)")
    parser.add_argument(
        "--lanes", type=int, action="append", metavar="N", help="may be given again; 1 always is (default: 1, 2, 4, 8)"
    )
    numbers = {
        "--prompt-tokens": (1024, "of the prefill"),
        "--chunk-tokens": (128, "of the prompt in one batch"),
        "--sequences": (16, "at once, of prompts and of those that decode"),
        "--steps": (16, "of decoding"),
        "--threads": (max(1, len(cores()) - 1), "of the TEE side"),
        "--rounds": (5, "of all numbers of lanes"),
    }
    for name, (default, meaning) in numbers.items():
        parser.add_argument(name, type=int, default=default, metavar="N", help=f"{meaning} (default: {default})")
    parser.add_argument("--by", choices=BY, default=BY[0], help=f"share the device's time out (default: {BY[0]})")
    parser.add_argument("--limit-s", type=float, default=60, metavar="N", help="for the rounds of each (default: 60)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there too")
    return parser


def _settings(arguments: argparse.Namespace) -> Settings:
    """Raises BadInputError."""
    numbers = {
        name: getattr(arguments, name) for name in ("prompt_tokens", "chunk_tokens", "sequences", "steps", "threads")
    }
    lanes = tuple(sorted({ONE, *(arguments.lanes or LANES)}))
    if min(arguments.rounds, *lanes, *numbers.values()) < 1:
        raise BadInputError("all numbers are at least 1")
    if max(lanes) > MAX_LANES:
        raise BadInputError(f"--lanes is at most {MAX_LANES}")
    model = arguments.model or str(demo_model.prepare())
    most = Checkpoint.find(model).spec.max_positions - 1
    if max(arguments.prompt_tokens, arguments.chunk_tokens, DECODE_PROMPT_TOKENS + arguments.steps) > most:
        raise BadInputError(
            f"--prompt-tokens and --chunk-tokens are at most {most} for this model, and --steps "
            f"{most - DECODE_PROMPT_TOKENS}"
        )
    limits = Limits(arguments.rounds, arguments.limit_s)
    return Settings(model, arguments.dtype, lanes, by=arguments.by, limits=limits, **numbers)


def _report(arguments: argparse.Namespace) -> dict[str, Any]:
    settings = _settings(arguments)
    works = settings.works(Checkpoint.find(settings.model).spec.vocab_size)
    described = machine.describe()
    with steps(1 + len(works) * (1 + settings.limits.rounds)) as step:
        results = run(settings, works, step)
    return {
        "benchmark": "overlap",
        "machine": described,
        "settings": dataclasses.asdict(settings),
        "aim": {"ratio": AIM},
        "results": results,
    }


def _print(report: Mapping[str, Any], out: Path | None) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(machine.summary(report["machine"]), highlight=False, soft_wrap=True)
    for result in report["results"]:
        console.print(_table(result))
    publish(report, out)


def _table(result: Mapping[str, Any]) -> Table:
    quiet = f"{result['quiet_rounds']} of {result['rounds']} rounds quiet"
    title = f"{result['work']}: the TEE side alone {result['own_s']:.3f} s, {quiet}"
    table = Table(title=title, title_justify="left")
    for heading in (
        "lanes",
        "device, s",
        "time, s",
        "of one lane",
        "interval",
        "aim",
        "of sum",
        "ideal",
        "calls",
        "late, us",
    ):
        table.add_column(heading, justify="right")
    for row in result["lanes"]:
        interval = f"{row['interval']['low']:.2f} to {row['interval']['high']:.2f}"
        aim = f"{AIM}: {row['verdict']}" if row["verdict"] else ""
        times = f"{row['device_s']:.3f}", f"{row['seconds']:.3f}", f"{row['ratio']:.2f}", interval
        shares = f"{row['of_sum']:.2f}", f"{row['ideal']:.2f}"
        table.add_row(str(row["lanes"]), *times, aim, *shares, str(row["calls"]), f"{row['late_us']:.0f}")
    return table


def main(words: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(words)
    with ending("benchmarks.overlap", demo_model.DemoModelError) as end:
        _print(_report(arguments), arguments.out)
    return end.code


if __name__ == "__main__":
    sys.exit(main())
