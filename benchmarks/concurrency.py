"""What requests gain by sharing an engine, and what each of them waits for it.

    python -m benchmarks.concurrency [--model MODEL] [--dtype DTYPE] [--requests N]... [--prompt-tokens N]
                                     [--new-tokens N] [--rounds N] [--limit-s N] [--engine KEY=VALUE]... [--out FILE]

One engine with its default settings and a GPU side of its own on this CPU. In each round 1, 2, 4, 8, 16 and 32
requests (or each --requests) are asked for in the same moment: prompts of --prompt-tokens random tokens (64), no two
alike, and greedy answers of exactly --new-tokens tokens (32). Times are the callers':

- tokens/s: the new tokens of all requests, by the time until the last of them has come. Prompts are in that time.
  `speed-up` is its ratio to one request's, round by round. The aim is 4 with 8 requests.
- first token: from asking to each request's first one, ms.
- gap: from each token of a request to its next one, ms.

Medians over the rounds for tokens/s; the percentiles are of all requests, or all gaps, of all rounds together. Rounds
are taken until --rounds of them were quiet (others took at most 5 % of the cores), or --limit-s are over.

Not measured: a GPU, a network, requests that come and go, sampling other than greedy.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.config import OneLineParser
from asynctsqp.errors import BadInputError
from asynctsqp.limits import WIRE_DTYPE_NAMES
from benchmarks import demo_model, machine
from benchmarks.cli import Step, add_engine_flag, ending, engine_options, publish, steps
from benchmarks.contenders import Answer, Split
from benchmarks.figures import compare
from benchmarks.harness import PATIENCE_S, Worker
from benchmarks.rounds import alternate, how_quiet, percentile, used, verdict
from benchmarks.turns import Limits

AIM = 4.0  # times the tokens/s of one request
AIM_REQUESTS = 8
REQUESTS = (1, 2, 4, 8, 16, 32)
ONE = 1
MOST_REQUESTS = 1024
PERCENTS = (50, 99)


def run(
    model: str, options: dict[str, Any], requests: Sequence[int], sizes: tuple[int, int], limits: Limits, step: Step
) -> dict[str, Any]:
    """options: of the engine, with dtype; sizes: tokens of a prompt, and of an answer."""
    prompt_tokens, new_tokens = sizes
    prompts = random_prompts(Checkpoint.find(model).spec.vocab_size, max(requests), prompt_tokens)
    engine = dict(options)
    with Split.worker(min(PATIENCE_S, limits.seconds / 20)) as worker:
        step("loading")
        worker.ask("load", model=model, dtype=engine.pop("dtype"), options=engine)
        worker.sleep()
        step("warm-up")
        _measure(worker, prompts[: max(requests)], new_tokens)
        rounds = alternate(requests, lambda count: _measure(worker, prompts[:count], new_tokens), limits, step)
    chosen = used(rounds)
    return {"requests": [_figures(chosen, count) for count in requests], **how_quiet(rounds)}


def random_prompts(vocab_size: int, count: int, tokens: int) -> list[list[int]]:
    """Always the same ones."""
    seeded = random.Random(0)
    return [[seeded.randrange(vocab_size) for _ in range(tokens)] for _ in range(count)]


def _measure(worker: Worker, prompts: Sequence[list[int]], new_tokens: int) -> Answer:
    return worker.measure("together", prompts=prompts, new_tokens=new_tokens)


def _figures(rounds: Sequence[Mapping[int, Answer]], requests: int) -> dict[str, Any]:
    """Of one number of requests."""
    rates = [_rate(taken[requests]) for taken in rounds]
    comparison = compare(rates, [_rate(taken[ONE]) for taken in rounds])
    last = rounds[-1][requests]
    return {
        "requests": requests,
        "tokens": last["tokens"],
        "calls_of_a_request": max(last["calls"]),
        "tokens_per_s": comparison.ours_median,
        "speed_up": comparison.ratio,
        "interval": dataclasses.asdict(comparison.interval),
        "verdict": verdict(comparison.ratio >= AIM, rounds) if requests == AIM_REQUESTS else "",
        "first_ms": _percentiles([seconds for taken in rounds for seconds in taken[requests]["first_s"]]),
        "gap_ms": _percentiles([seconds for taken in rounds for seconds in taken[requests]["gaps_s"]]),
        "samples": rates,
    }


def _rate(answer: Answer) -> float:
    return float(answer["tokens"] / answer["seconds"])


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    return {f"p{percent}": 1e3 * percentile(seconds, percent) for percent in PERCENTS}


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="benchmarks.concurrency", description="What requests gain by sharing an engine.")
    parser.add_argument("--model", metavar="MODEL", help="a checkpoint, or random:NAME (default: the demo model)")
    parser.add_argument("--dtype", choices=WIRE_DTYPE_NAMES, default="float32", help="(default: float32)")
    parser.add_argument(
        "--requests",
        type=int,
        action="append",
        metavar="N",
        help="at once; may be given again, 1 always is (default: 1, 2, 4, 8, 16, 32)",
    )
    parser.add_argument("--prompt-tokens", type=int, default=64, metavar="N", help="of each (default: 64)")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N", help="of each, at least 2 (default: 32)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(default: 3)")
    parser.add_argument("--limit-s", type=float, default=150, metavar="N", help="for the rounds (default: 150)")
    add_engine_flag(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there too")
    return parser


def _report(arguments: argparse.Namespace) -> dict[str, Any]:
    options = engine_options(arguments.engine)
    requests = sorted({ONE, *(arguments.requests or REQUESTS)})
    sizes = arguments.prompt_tokens, arguments.new_tokens
    _check(options, requests, sizes, arguments.rounds)
    model = arguments.model or str(demo_model.prepare())
    most = Checkpoint.find(model).spec.max_positions
    if sum(sizes) > most:
        raise BadInputError(f"--prompt-tokens and --new-tokens are at most {most} together for this model")
    limits = Limits(arguments.rounds, arguments.limit_s)
    options = {"dtype": arguments.dtype} | options
    settings = {
        "model": model,
        "engine": options,
        "prompt_tokens": arguments.prompt_tokens,
        "new_tokens": arguments.new_tokens,
        **dataclasses.asdict(limits),
    }
    described = machine.describe()
    with steps(2 + limits.rounds) as step:
        results = run(model, options, requests, sizes, limits, step)
    aim = {"requests": AIM_REQUESTS, "speed_up": AIM}
    return {"benchmark": "concurrency", "machine": described, "settings": settings, "aim": aim, "results": results}


def _check(options: Mapping[str, Any], requests: Sequence[int], sizes: tuple[int, int], rounds: int) -> None:
    """Raises BadInputError."""
    if "dtype" in options:
        raise BadInputError("use --dtype")
    if min(*requests, *sizes, rounds) < 1 or sizes[1] < 2:  # a single token has no gap before it
        raise BadInputError("--requests, --prompt-tokens and --rounds are at least 1, --new-tokens 2")
    if max(requests) > MOST_REQUESTS:
        raise BadInputError(f"--requests is at most {MOST_REQUESTS}")


def _print(report: Mapping[str, Any], out: Path | None) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(machine.summary(report["machine"]), highlight=False, soft_wrap=True)
    console.print(_table(report["results"]))
    publish(report, out)


def _table(results: Mapping[str, Any]) -> Table:
    quiet = f"{results['quiet_rounds']} of {results['rounds']} rounds quiet"
    table = Table(title=f"requests at once, {quiet}", title_justify="left")
    names = "requests", "tokens/s", "speed-up", "interval", "aim", "first token p50", "p99, ms", "gap p50", "p99, ms"
    for heading in names:
        table.add_column(heading, justify="right")
    for row in results["requests"]:
        interval = f"{row['interval']['low']:.2f} to {row['interval']['high']:.2f}"
        aim = f"{AIM:.0f}: {row['verdict']}" if row["verdict"] else ""
        latencies = (f"{row[key][f'p{percent}']:.0f}" for key in ("first_ms", "gap_ms") for percent in PERCENTS)
        rates = f"{row['tokens_per_s']:.1f}", f"{row['speed_up']:.2f}", interval
        table.add_row(str(row["requests"]), *rates, aim, *latencies)
    return table


def main(words: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(words)
    with ending("benchmarks.concurrency", demo_model.DemoModelError) as end:
        _print(_report(arguments), arguments.out)
    return end.code


if __name__ == "__main__":
    sys.exit(main())
