"""What each step from the predecessor's design to this one is worth, on one model.

    python -m benchmarks.ladder [--model DIR|random:NAME] [--dtype float32|bfloat16]... [--rung NAME]...
                                [--prompt-tokens N] [--rounds N] [--limit-s N] [--threads N]
                                [--out FILE] [--plot FILE]
    python -m benchmarks.ladder --render FILE

The rungs (benchmarks.rungs) are settings of one engine, and each differs from an earlier one, its "from", by one
thing, in the order of the predecessor's road map: linears batched, frames instead of msgpack, shared memory, the
doorbell, fusion, bfloat16. The rungs up to `batched-shm-bf16` leave all that is a product to the GPU side, attention
and embedding too, as the predecessor did; `shielded` is this project's default. The `seed` rung is a reconstruction of
the predecessor's last version with this project's code: what that version itself took stands beside it, from its own
machine. Per rung:

- prefill: s to the first token of the answer to a prompt of --prompt-tokens (1024).
- decode: ms per token, from the first to the 33rd token of a greedy answer to a 64-token prompt.
- calls and bytes of tensors (both ways) of one prefill and of one decode step.
- communication: 1 - (TEE side's computing + GPU side's computing) / time, from the engine's own records; see
  benchmarks.communication. The records are on in every rung, and take well under 1 % of a decode step.
- speed-up: the `seed` rung's median over this rung's; where that was left out, the first rung's that was not.
- ratio: this rung's median over that of `transformers` in one process, in the same dtype: the line to beat.
- whether all answers had the tokens of transformers. In float32 they should; in bfloat16 both round, each its own way.

Each rung is an engine in a process of its own, which ends when the rung does, so that one engine and one transformers
are all that has to fit the memory. They take turns, A B A B, and who is not measured is stopped; benchmarks.baseline
says how that is done, what a disturbed pair is, and which settings transformers has. --limit-s bounds the rounds of one
rung, and a tenth of it the wait for a quiet machine before each sample. Each
measure is taken at least once.

For `random:NAME` transformers gets the same tensors as the engine.

Not measured: float16 (a CPU without instructions for it makes these products no faster than float32's in a prefill,
and took two and a half times as long for a single row); masks, several lanes, compression, a network, a GPU, an
enclave.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.config import OneLineParser
from asynctsqp.errors import BadInputError
from benchmarks import demo_model, machine
from benchmarks.cli import Step, ending, publish, steps
from benchmarks.communication import communication_share
from benchmarks.contenders import Measure, Split, Transformers, random_prompt
from benchmarks.harness import PATIENCE_S, use_cores
from benchmarks.ladder_table import markdown, show
from benchmarks.rungs import PREDECESSOR_PREFILL, REFERENCE, ROAD_MAP, RUNGS, Rung
from benchmarks.traffic import of_a_prefill, of_a_step
from benchmarks.turns import Limits, Pair, take_turns, times, used

DTYPES = tuple(dict.fromkeys(rung.dtype for rung in RUNGS))
STEPS = 32  # of decoding
DECODE_PROMPT = 64
BESIDES_ROUNDS = 2  # steps of a rung: loading, warm-up

Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """What all rungs have in common. limits: of one rung."""

    model: str
    prompt: list[int]
    limits: Limits

    @property
    def prefill(self) -> Measure:
        return Measure("prefill", "s", len(self.prompt), 1, "first_s", 1.0)

    @property
    def decode(self) -> Measure:
        return Measure("decode", "ms/token", min(DECODE_PROMPT, len(self.prompt)), STEPS + 1, "rest_s", 1e3 / STEPS)

    @property
    def measures(self) -> tuple[Measure, Measure]:
        return self.prefill, self.decode

    @property
    def patience_s(self) -> float:
        return min(PATIENCE_S, self.limits.seconds / 10)


def climb(run: Run, rungs: Sequence[Rung], step: Step) -> dict[str, Result]:
    """All rungs, in their own order; measured dtype by dtype, so that one transformers is alive at a time."""
    found: dict[str, Result] = {}
    for dtype in dict.fromkeys(rung.dtype for rung in rungs):
        found |= _climb_in(run, dtype, [rung for rung in rungs if rung.dtype == dtype], step)
    return _with_speed_ups({rung.name: found[rung.name] for rung in rungs})


def _climb_in(run: Run, dtype: str, rungs: Sequence[Rung], step: Step) -> Iterator[tuple[str, Result]]:
    with Transformers.worker(run.patience_s) as worker:
        step(f"transformers, {dtype}")
        worker.ask("load", model=run.model, dtype=dtype)
        transformers = Transformers(worker, run.prompt)
        transformers.warm_up(run.measures)
        for rung in rungs:
            yield rung.name, _rung(run, rung, transformers, step)


def _rung(run: Run, rung: Rung, transformers: Transformers, step: Step) -> Result:
    """From loading to the figures."""
    with Split.worker(run.patience_s) as worker:
        step(f"{rung.name}: loading")
        worker.ask("load", model=run.model, dtype=rung.dtype, options=rung.options())
        split = Split(worker, run.prompt)
        step(f"{rung.name}: warm-up")
        split.warm_up(run.measures)
        pairs = take_turns(split, transformers, run.measures, run.limits, lambda text: step(f"{rung.name}: {text}"))
        first_token = split.first_token(run.decode)
    prefill, decode = pairs[run.prefill.name], pairs[run.decode.name]
    return {
        **dataclasses.asdict(rung),
        "attention": transformers.attention,
        "same_tokens": all(pair.ours["token_ids"] == pair.theirs["token_ids"] for pair in [*prefill, *decode]),
        "prefill": of_a_prefill(prefill[-1].ours) | _figures(run.prefill, prefill),
        "decode": of_a_step(decode[-1].ours, first_token) | _figures(run.decode, decode),
    }


def _figures(measure: Measure, pairs: Sequence[Pair]) -> Result:
    shares = [communication_share(pair.ours, measure.key) for pair in used(pairs)]
    return {"communication_share": statistics.median(shares), **times(measure, pairs)}


def _with_speed_ups(results: dict[str, Result]) -> dict[str, Result]:
    reference = results.get(REFERENCE) or next(iter(results.values()))
    for result in results.values():
        for name in ("prefill", "decode"):
            result[name]["speed_up"] = reference[name]["ours_median"] / result[name]["ours_median"]
    return results


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="benchmarks.ladder", description="What each step from the predecessor is worth.")
    parser.add_argument("--model", metavar="MODEL", help="a checkpoint, or random:NAME (default: the demo model)")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="rungs in it; may be given again")
    names = tuple(rung.name for rung in RUNGS)
    parser.add_argument("--rung", choices=names, action="append", help="may be given again (default: all)")
    parser.add_argument("--prompt-tokens", type=int, default=1024, metavar="N", help="of a prefill (default: 1024)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="(default: 5)")
    parser.add_argument("--limit-s", type=float, default=90, metavar="N", help="for one rung's rounds (default: 90)")
    parser.add_argument("--threads", type=int, metavar="N", help="cores of each contender (default: all)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the times (png, svg or pdf)")
    parser.add_argument("--render", type=Path, metavar="FILE", help="measure nothing: a result's table, as Markdown")
    return parser


def _rungs(arguments: argparse.Namespace) -> list[Rung]:
    names, dtypes = arguments.rung, arguments.dtype
    chosen = [rung for rung in RUNGS if (not names or rung.name in names) and (not dtypes or rung.dtype in dtypes)]
    if not chosen:
        raise BadInputError("none of these rungs is in this dtype")
    return chosen


def _run(arguments: argparse.Namespace) -> Run:
    if min(arguments.rounds, arguments.prompt_tokens, arguments.threads or 1) < 1:
        raise BadInputError("--rounds, --prompt-tokens and --threads are at least 1")
    model = arguments.model or str(demo_model.prepare())
    spec = Checkpoint.find(model).spec
    most = spec.max_positions - STEPS - 1
    if arguments.prompt_tokens > most:
        raise BadInputError(f"--prompt-tokens is at most {most} for this model")
    return Run(model, random_prompt(spec, arguments.prompt_tokens), Limits(arguments.rounds, arguments.limit_s))


def _report(arguments: argparse.Namespace) -> dict[str, Any]:
    rungs, run = _rungs(arguments), _run(arguments)
    use_cores(arguments.threads)
    described = machine.describe()
    dtypes = {rung.dtype for rung in rungs}
    with steps(len(dtypes) + len(rungs) * (BESIDES_ROUNDS + run.limits.rounds), lines=True) as step:
        results = climb(run, rungs, step)
    settings = {"model": run.model, "prompt_tokens": len(run.prompt), **dataclasses.asdict(run.limits)}
    predecessor = {"prefill": PREDECESSOR_PREFILL, "road_map": ROAD_MAP}
    return {
        "benchmark": "ladder",
        "machine": described,
        "settings": settings,
        "predecessor": predecessor,
        "results": results,
    }


def _print(report: Mapping[str, Any], out: Path | None, plot: Path | None) -> None:
    show(report, Console(width=None if sys.stdout.isatty() else 140))
    publish(report, out)
    if plot is not None:
        from benchmarks.ladder_plot import draw  # matplotlib takes long to load

        draw(report, plot)


def main(words: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(words)
    with ending("benchmarks.ladder", demo_model.DemoModelError, ValueError) as end:
        if arguments.render is not None:
            print(markdown(json.loads(arguments.render.read_text())))
        else:
            _print(_report(arguments), arguments.out, arguments.plot)
    return end.code


if __name__ == "__main__":
    sys.exit(main())
