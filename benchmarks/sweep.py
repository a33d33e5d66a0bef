"""The engine's automatic settings against explicit ones: is anything lost by setting nothing?

    python -m benchmarks.sweep [--model DIR|random:NAME] [--dtype float32|bfloat16|float16] [--setting NAME]...
                               [--prompt-tokens N] [--rounds N] [--pairs N] [--limit-s N] [--out FILE]

A setting is one option, or two, in the words of --engine elsewhere; all else stays automatic. Measured, as the
caller sees it:

- decode: ms per token, from the first to the 17th token of a greedy answer to a 64-token prompt.
- prefill: ms to the first token of the answer to a prompt of --prompt-tokens (1024).

The quickest of many is quick by luck too: whoever is chosen by some samples looks better in them than it is. So for
each measure

1. --rounds rounds in which all take turns choose the best: the lowest median among the explicit settings;
2. --pairs new pairs of samples, automatic and best by turns, compare the two. No sample of the first step counts.

The aim: automatic is at most 1.05 times the best, as far as paired runs can tell, that is, the 95 % interval of the
ratio within a pair holds 1.05 or lies below it. Where all of it lies below, the aim is shown to be reached; where it
holds 1.05, only that these pairs cannot tell. Fewer than six pairs make no such interval, and disturbed ones (see
benchmarks.baseline) no figure to trust: then there is no verdict.

Each setting is an engine in a process of its own, with a GPU side of its own on this CPU; all stay loaded, and who is
not measured is stopped. In float32 the demo model takes some 1.2 GB a setting: --setting chooses fewer. Each of the
four steps (two measures) begins no round once a quarter of --limit-s is over, but has at least one.

Settings of which an engine makes the same as of none (which ones depends on the machine and the model) are left out:
they could only win by luck. A --setting that is named is measured in any case, and so shows how far equal engines lie
apart.

Not measured: a GPU, a network, several requests at once, settings that are not in the list.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.config import OneLineParser
from asynctsqp.errors import BadInputError
from asynctsqp.limits import WIRE_DTYPE_NAMES
from benchmarks import demo_model, machine
from benchmarks.cli import Step, ending, publish, steps
from benchmarks.contenders import Answer, Measure, Split, random_prompt
from benchmarks.figures import CONFIDENCE, compare
from benchmarks.harness import PATIENCE_S
from benchmarks.rounds import alternate, how_quiet, used
from benchmarks.sweep_settings import AUTOMATIC, options_of, settings, unlike_automatic
from benchmarks.sweep_table import show
from benchmarks.turns import Limits, take_turns, times

AIM = 1.05  # automatic over best
STEPS = 16  # of decoding
DECODE_PROMPT = 64
PHASES = 4  # choosing and comparing, for two measures
LOADING = 2  # engines at once: one takes more memory, and one core, while it loads


@dataclasses.dataclass(frozen=True)
class Run:
    """What all settings have in common. choosing, comparing: the limits of one measure's rounds, and pairs."""

    model: str
    dtype: str
    prompt: list[int]
    choosing: Limits
    comparing: Limits

    @property
    def measures(self) -> tuple[Measure, Measure]:
        decode_prompt = min(DECODE_PROMPT, len(self.prompt))
        return (
            Measure("decode", "ms/token", decode_prompt, STEPS + 1, "rest_s", 1e3 / STEPS),
            Measure("prefill", "ms", len(self.prompt), 1, "first_s", 1e3),
        )

    @property
    def patience_s(self) -> float:
        return min(PATIENCE_S, self.choosing.seconds / 20)


def sweep(run: Run, chosen: Sequence[str], step: Step) -> dict[str, Any]:
    """From loading to the figures, by measure. chosen: explicit settings."""
    names = (AUTOMATIC, *chosen)
    with contextlib.ExitStack() as stack:
        engines: dict[str, Split] = {}
        for first in range(0, len(names), LOADING):
            engines |= _engines(run, names[first : first + LOADING], stack, step)
        return {measure.name: _measure(run, measure, engines, step) for measure in run.measures}


def _engines(run: Run, names: Sequence[str], stack: contextlib.ExitStack, step: Step) -> dict[str, Split]:
    """Loaded at once, warm and asleep."""
    workers = {name: stack.enter_context(Split.worker(run.patience_s)) for name in names}
    for name, worker in workers.items():
        step(f"{name}: loading")
        worker.send("load", model=run.model, dtype=run.dtype, options=options_of(name))
    for worker in workers.values():
        worker.receive()
    engines = {name: Split(worker, run.prompt) for name, worker in workers.items()}
    for engine in engines.values():
        engine.warm_up(run.measures)
    return engines


def _measure(run: Run, measure: Measure, engines: Mapping[str, Split], step: Step) -> dict[str, Any]:
    """Both steps of one measure."""

    def say(text: str) -> None:
        step(f"{measure.name}: {text}")

    rounds = alternate(list(engines), lambda name: engines[name].run(measure), run.choosing, say)
    found = {name: _figures(measure, used(rounds), name) for name in engines}
    best = quickest(found)
    taken = take_turns(engines[AUTOMATIC], engines[best], (measure,), run.comparing, say)
    figures = times(measure, taken[measure.name])
    return {
        "unit": measure.unit,
        "settings": found,
        **how_quiet(rounds),
        "best": best,
        "comparison": figures | {"verdict": verdict(figures)},
    }


def _figures(measure: Measure, rounds: Sequence[Mapping[str, Answer]], name: str) -> dict[str, Any]:
    """One setting in the rounds of all. ratio: of automatic's median to this one's."""
    samples = [measure.value(taken[name]) for taken in rounds]
    comparison = compare([measure.value(taken[AUTOMATIC]) for taken in rounds], samples)
    tokens = [(taken[name]["token_ids"], taken[AUTOMATIC]["token_ids"]) for taken in rounds]
    return {
        "options": options_of(name),
        "median": comparison.theirs_median,
        "ratio": comparison.ratio,
        "calls": rounds[-1][name]["rpc"]["calls"],
        "same_tokens": all(one == other for one, other in tokens),
        "samples": samples,
    }


def quickest(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Of the explicit settings, the one with the lowest median."""
    return min((name for name in found if name != AUTOMATIC), key=lambda name: float(found[name]["median"]))


def verdict(figures: Mapping[str, Any]) -> str:
    """What the pairs say about the aim. figures: of benchmarks.turns.times, automatic and best."""
    interval = figures["interval"]
    if figures["disturbed"]:
        return "disturbed"
    if interval["confidence"] < CONFIDENCE:
        return "too few pairs"
    if interval["low"] > AIM:
        return "missed"
    return "reached" if interval["high"] <= AIM else "cannot be told apart"


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="benchmarks.sweep", description="Automatic settings against explicit ones.")
    parser.add_argument("--model", metavar="MODEL", help="a checkpoint, or random:NAME (default: the demo model)")
    parser.add_argument("--dtype", choices=WIRE_DTYPE_NAMES, default="float32", help="(default: float32)")
    parser.add_argument(
        "--setting", choices=settings(), action="append", help="may be given again (default: all that differ)"
    )
    parser.add_argument("--prompt-tokens", type=int, default=1024, metavar="N", help="of a prefill (default: 1024)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="to choose the best in (default: 3)")
    parser.add_argument("--pairs", type=int, default=12, metavar="N", help="to compare it in (default: 12)")
    parser.add_argument("--limit-s", type=float, default=140, metavar="N", help="for both together (default: 140)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there too")
    return parser


def _run(arguments: argparse.Namespace) -> Run:
    if min(arguments.rounds, arguments.pairs, arguments.prompt_tokens) < 1:
        raise BadInputError("--rounds, --pairs and --prompt-tokens are at least 1")
    model = arguments.model or str(demo_model.prepare())
    spec = Checkpoint.find(model).spec
    most = spec.max_positions - STEPS - 1
    if arguments.prompt_tokens > most:
        raise BadInputError(f"--prompt-tokens is at most {most} for this model")
    seconds = arguments.limit_s / PHASES
    choosing, comparing = Limits(arguments.rounds, seconds), Limits(arguments.pairs, seconds)
    return Run(model, arguments.dtype, random_prompt(spec, arguments.prompt_tokens), choosing, comparing)


def _report(arguments: argparse.Namespace) -> dict[str, Any]:
    run = _run(arguments)
    chosen = tuple(dict.fromkeys(arguments.setting or unlike_automatic(Checkpoint.find(run.model), run.dtype)))
    described = machine.describe()
    with steps(1 + len(chosen) + len(run.measures) * (arguments.rounds + arguments.pairs), lines=True) as step:
        results = sweep(run, chosen, step)
    common = {
        "model": run.model,
        "dtype": run.dtype,
        "prompt_tokens": len(run.prompt),
        "rounds": arguments.rounds,
        "pairs": arguments.pairs,
        "seconds": arguments.limit_s,
    }
    return {"benchmark": "sweep", "machine": described, "settings": common, "aim": AIM, "results": results}


def _print(report: Mapping[str, Any], out: Path | None) -> None:
    show(report, Console(width=None if sys.stdout.isatty() else 120))
    publish(report, out)


def main(words: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(words)
    with ending("benchmarks.sweep", demo_model.DemoModelError) as end:
        _print(_report(arguments), arguments.out)
    return end.code


if __name__ == "__main__":
    sys.exit(main())
