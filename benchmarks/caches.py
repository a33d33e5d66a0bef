"""What keeping keys, values and angles from token to token is worth.

    python -m benchmarks.caches [--model MODEL] [--dtype DTYPE] [--context N]... [--steps N] [--rounds N]
                                [--limit-s N] [--out FILE]

One engine with its default settings and a GPU side of its own, greedy, after a prompt of each --context (64, 256 and
1024 random tokens); --steps tokens after the first one (8), twice:

- cached: as one answer. The KV cache and the table of rotary angles live on from one token to the next.
- again: each token as the first one of an answer to everything before it, which is a prefill, from nothing.

Medians of ms per token over --rounds by turns, A B A B, and their ratio, `speed_up`. `same_tokens`: both gave the same
ones, in every round. The first tokens, which cost both a prefill, are not in the times.

Both caches are switched together: what each is worth alone is not measured. Nor is transformers; benchmarks.baseline
has that. A pair is taken again while others use more than 5 % of the cores and --limit-s, of one context, lasts.
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
from asynctsqp.limits import WIRE_DTYPE_NAMES
from benchmarks import demo_model, machine
from benchmarks.cli import Step, ending, publish, steps
from benchmarks.contenders import Answer, Measure, Split, random_prompt
from benchmarks.harness import PATIENCE_S, Worker
from benchmarks.turns import Limits, take_turns, times

CONTEXTS = (64, 256, 1024)


class Again:
    """The same engine as a contender that keeps nothing."""

    def __init__(self, worker: Worker, prompt: list[int]) -> None:
        self._worker = worker
        self._prompt = prompt

    def warm_up(self, measures: Sequence[Measure]) -> None:
        for measure in measures:
            self.run(dataclasses.replace(measure, new_tokens=1))

    def run(self, measure: Measure) -> Answer:
        tokens = self._prompt[: measure.prompt_tokens]
        return self._worker.measure("again", tokens=tokens, new_tokens=measure.new_tokens)


def run(model: str, dtype: str, measures: Sequence[Measure], limits: Limits, step: Step) -> list[dict[str, Any]]:
    """All contexts. limits: of one."""
    prompt = random_prompt(Checkpoint.find(model).spec, max(measure.prompt_tokens for measure in measures))
    with Split.worker(min(PATIENCE_S, limits.seconds / 10)) as worker:
        step("loading")
        worker.ask("load", model=model, dtype=dtype, options={})
        cached, again = Split(worker, prompt), Again(worker, prompt)
        step("warm-up")
        cached.warm_up(measures)
        again.warm_up(measures)
        return [_context(cached, again, measure, limits, step) for measure in measures]


def _context(cached: Split, again: Again, measure: Measure, limits: Limits, step: Step) -> dict[str, Any]:
    pairs = take_turns(cached, again, [measure], limits, lambda text: step(f"{measure.name}: {text}"))[measure.name]
    figures = times(measure, pairs)
    return {
        "context": measure.prompt_tokens,
        "cached_ms": figures["ours_median"],
        "again_ms": figures["theirs_median"],
        "speed_up": figures["theirs_median"] / figures["ours_median"],
        "same_tokens": all(pair.ours["token_ids"] == pair.theirs["token_ids"] for pair in pairs),
        "disturbed": figures["disturbed"],
        "samples": [
            {"cached": each["ours"], "again": each["theirs"], "quiet": each["quiet"]} for each in figures["samples"]
        ],
    }


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="benchmarks.caches", description="What keeping keys, values and angles is worth.")
    parser.add_argument("--model", metavar="MODEL", help="a checkpoint, or random:NAME (default: the demo model)")
    parser.add_argument("--dtype", choices=WIRE_DTYPE_NAMES, default="float32", help="(default: float32)")
    parser.add_argument(
        "--context", type=int, action="append", metavar="N", help="may be given again (default: 64, 256, 1024)"
    )
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="of decoding (default: 8)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="(default: 5)")
    parser.add_argument("--limit-s", type=float, default=90, metavar="N", help="for one context (default: 90)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there too")
    return parser


def _measures(model: str, contexts: Sequence[int], new: int) -> list[Measure]:
    most = Checkpoint.find(model).spec.max_positions - new - 1
    if max(contexts) > most:
        raise BadInputError(f"--context is at most {most} for this model and --steps {new}")
    return [Measure(f"{count} tokens", "ms/token", count, new + 1, "rest_s", 1e3 / new) for count in contexts]


def _report(arguments: argparse.Namespace) -> dict[str, Any]:
    contexts = tuple(dict.fromkeys(arguments.context or CONTEXTS))
    if min(arguments.steps, arguments.rounds, *contexts) < 1:
        raise BadInputError("--context, --steps and --rounds are at least 1")
    model = arguments.model or str(demo_model.prepare())
    limits = Limits(arguments.rounds, arguments.limit_s)
    measures = _measures(model, contexts, arguments.steps)
    settings = {"model": model, "dtype": arguments.dtype, "steps": arguments.steps, **dataclasses.asdict(limits)}
    described = machine.describe()
    with steps(2 + len(measures) * limits.rounds) as step:
        results = run(model, arguments.dtype, measures, limits, step)
    return {"benchmark": "caches", "machine": described, "settings": settings, "results": results}


def _print(report: Mapping[str, Any], out: Path | None) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(machine.summary(report["machine"]), highlight=False, soft_wrap=True)
    console.print(_table(report["results"]))
    publish(report, out)


def _table(results: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="decode, ms/token", title_justify="left")
    for heading in ("context", "cached", "again", "speed-up", "same tokens", "quiet pairs"):
        table.add_column(heading, justify="right")
    for row in results:
        figures = f"{row['cached_ms']:.1f}", f"{row['again_ms']:.1f}", f"{row['speed_up']:.1f}"
        quiet = f"{sum(sample['quiet'] for sample in row['samples'])} of {len(row['samples'])}"
        table.add_row(str(row["context"]), *figures, "yes" if row["same_tokens"] else "NO", quiet)
    return table


def main(words: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(words)
    with ending("benchmarks.caches", demo_model.DemoModelError) as end:
        _print(_report(arguments), arguments.out)
    return end.code


if __name__ == "__main__":
    sys.exit(main())
