"""This project and `transformers`, side by side on the CPU.

    python -m benchmarks.baseline [--model DIR] [--dtype float32|bfloat16] [--threads N] [--rounds N]
                                  [--limit-s N] [--engine KEY=VALUE]... [--out FILE]

Measured, per dtype, as the caller of either library in a warm process sees it:

- decode: ms per token, from the first to the 65th token of a greedy answer to a 64-token prompt.
- prefill: ms to the first token of the answer to a 1024-token prompt.
- memory: each process's peak resident size since its start, loading the model included.
- for this project, per decoded token and per 1024-token prompt: calls to the GPU side and bytes of tensors
  both ways; and the share of an answer's time that was spent waiting for the GPU side.

Each contender has processes of its own and the same cores: --threads binds both to that many; how many threads
it runs on them is its own choice (--engine threads=N overrides ours). They take turns, A B A B, and who is not
measured is stopped. transformers runs `generate` in inference mode, with its default OpenMP settings, and for
each measure with the attention implementation that was faster in the warm-up. This project turns its tokens
into text and hands each one over as it comes; transformers does neither here.

A pair of samples during which other processes had more than 5 % of the cores' time is disturbed, and taken again
while --limit-s lasts: transformers' threads wait by spinning, and take ten times as long when they lose a core,
so that disturbed figures would flatter this project. Where there are fewer than three others, they are reported
as such, without a ratio.

Not measured: a GPU, a network between the sides, an enclave, masking, several requests at once, loading,
sampling other than greedy. The prompts are random tokens, since the work does not depend on what they say; of
the answers only `tokens_in_common` is reported (in float32 that should be all of them).
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from asynctsqp.config import OneLineParser
from asynctsqp.errors import BadInputError
from asynctsqp.model_spec import ModelSpec
from benchmarks import demo_model, machine
from benchmarks.baseline_table import show
from benchmarks.cli import Step, add_engine_flag, ending, engine_options, publish, steps
from benchmarks.contenders import Answer, Measure, Split, Transformers, random_prompt
from benchmarks.harness import Worker, use_cores
from benchmarks.traffic import of_a_prefill, of_a_step
from benchmarks.turns import Limits, Pair, Pairs, take_turns, times, used

DTYPES = ("float32", "bfloat16")
STEPS = 64  # of decoding
DECODE = Measure("decode", "ms/token", 64, STEPS + 1, "rest_s", 1e3 / STEPS)
PREFILL = Measure("prefill", "ms", 1024, 1, "first_s", 1e3)
MEASURES = (DECODE, PREFILL)
BEFORE_THE_ROUNDS = 2  # steps of a run: loading, warm-up


def run(model: Path, dtype: str, options: dict[str, Any], limits: Limits, step: Step) -> dict[str, Any]:
    """One dtype, from loading to the figures. options: of the engine."""
    spec = ModelSpec.read(model / "config.json")
    prompt = random_prompt(spec, max(measure.prompt_tokens for measure in MEASURES))
    with Split.worker() as ours, Transformers.worker() as theirs:
        step(f"{dtype}: loading")
        settings = _load(ours, theirs, str(model), dtype, options)
        split, transformers = Split(ours, prompt), Transformers(theirs, prompt)
        step(f"{dtype}: warm-up")
        split.warm_up(MEASURES)
        transformers.warm_up(MEASURES)
        pairs = take_turns(split, transformers, MEASURES, limits, lambda text: step(f"{dtype}: {text}"))
        traffic = _traffic(pairs, split.first_token(DECODE))
        memory = ours.memory() | theirs.memory()
    return {
        "settings": settings | {"attention": transformers.attention},
        "times": {measure.name: times(measure, pairs[measure.name]) for measure in MEASURES},
        "tokens_in_common": _in_common(pairs[DECODE.name][-1]),
        "traffic": traffic,
        "memory": {
            "the TEE side": memory["benchmarks.split_worker"],
            "the GPU side": memory["asynctsqp.gpu"],
            "transformers": memory["benchmarks.transformers_worker"],
        },
    }


def _load(ours: Worker, theirs: Worker, model: str, dtype: str, options: dict[str, Any]) -> dict[str, Any]:
    """Both at once: loading is not measured."""
    ours.send("load", model=model, dtype=dtype, options=options)
    theirs.send("load", model=model, dtype=dtype)
    return {"asynctsqp": ours.receive(), "transformers": theirs.receive()}


def _in_common(pair: Pair) -> int:
    """How many of the tokens are the same, from the first one on."""
    both = list(zip(pair.ours["token_ids"], pair.theirs["token_ids"], strict=True))
    return next((index for index, (one, other) in enumerate(both) if one != other), len(both))


def _traffic(pairs: Pairs, first_token: Answer) -> dict[str, dict[str, float]]:
    """Of one decode step and of one prefill."""
    counts = {
        DECODE.name: of_a_step(pairs[DECODE.name][-1].ours, first_token),
        PREFILL.name: of_a_prefill(pairs[PREFILL.name][-1].ours),
    }
    return {name: count | {"wait_share": _wait_share(pairs[name])} for name, count in counts.items()}


def _wait_share(pairs: Sequence[Pair]) -> float:
    return statistics.median(float(pair.ours["wait_share"]) for pair in used(pairs))


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="benchmarks.baseline", description="This project and transformers, side by side.")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint (default: the demo model)")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="may be given again (default: both)")
    parser.add_argument("--threads", type=int, metavar="N", help="cores of each contender (default: all)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="(default: 7)")
    parser.add_argument(
        "--limit-s", type=float, default=110, metavar="N", help="for the rounds of one dtype (default: 110)"
    )
    add_engine_flag(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there too")
    return parser


def _report(arguments: argparse.Namespace) -> dict[str, Any]:
    options = engine_options(arguments.engine)
    if "dtype" in options:
        raise BadInputError("use --dtype, which is for both contenders")
    if arguments.rounds < 1 or (arguments.threads is not None and arguments.threads < 1):
        raise BadInputError("--rounds and --threads are at least 1")
    model = arguments.model or demo_model.prepare()
    limits = Limits(arguments.rounds, arguments.limit_s)
    settings = {"model": str(model), "engine": options, **dataclasses.asdict(limits)}
    use_cores(arguments.threads)
    described = machine.describe()
    dtypes = dict.fromkeys(arguments.dtype or DTYPES)
    with steps(len(dtypes) * (BEFORE_THE_ROUNDS + arguments.rounds)) as step:
        results = {dtype: run(model, dtype, options, limits, step) for dtype in dtypes}
    return {"benchmark": "baseline", "machine": described, "settings": settings, "results": results}


def _print(report: Mapping[str, Any], out: Path | None) -> None:
    titles = {one.name: f"{one.name} ({one.prompt_tokens}-token prompt), {one.unit}" for one in MEASURES}
    show(report, titles, Console(width=None if sys.stdout.isatty() else 120))
    publish(report, out)


def main(words: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(words)
    with ending("benchmarks.baseline", demo_model.DemoModelError) as end:
        _print(_report(arguments), arguments.out)
    return end.code


if __name__ == "__main__":
    sys.exit(main())
