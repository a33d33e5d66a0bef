"""What --protect costs, and what it would cost to do without the GPU side.

    python -m benchmarks.protect [--model MODEL] [--quick] [--mask-memory SIZE] [--sustained-tokens N]
                                 [--rounds N] [--limit-s N] [--engine KEY=VALUE]... [--out FILE]

Contenders, each in processes of its own on the same cores, by turns; who is not measured is stopped:

- none, verify, mask, full: this project in float32 with 8-bit weights, one GPU side on this CPU, masks from the bank.
- full, peer: masks from a second GPU side, here on the same machine: what it costs, not what it protects.
- int8 inside: the whole model in one process, as it would be inside the enclave, with torch's dynamic int8 linears.
  Its activations have 8 bits (ours 14 to 15): it is the cheapest of honest contenders, and less exact than full.
- transformers: the whole model in one process, float32. The last two use torch's own number of threads.

Measured, as the caller sees it:

- decode: ms per token, of a greedy answer of 65 tokens to 64 random ones. The aim is full at most 1.0 of none.
- prefill: ms to the first token after 1024. The aim is full, peer at most 2.0 of none.
  For both, masks for all of it are made before (a warm bank, or pads of the peer that are here already).
- bank: time and memory of the masks of one token, from an empty bank, made while nothing else runs.
- sustained: one answer of 2,000 tokens, then 8 of 250 at once, each contender just loaded: no masks are there at the
  beginning and none are owed at the end. tokens/s; and CPU ms a token of all processes, by the operating system's
  accounting: bank, GPU side and peer included.

Break-even: `of int8` and `of transformers` say what the split costs where the enclave could do everything itself;
below 1 it pays. Where the GPU side is a CPU, both sides' work is done by the same cores; a GPU takes its part away.

--quick is one round of a twentieth of it, to see that it works. Rounds are taken until --rounds of them were quiet
(others took at most 5 % of the cores), or --limit-s are over. Not measured: a GPU, a network, an enclave.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.config import OneLineParser, parse_size
from asynctsqp.errors import BadInputError
from asynctsqp.integer_weights import matrices
from asynctsqp.model_spec import ModelSpec
from benchmarks import demo_model, machine
from benchmarks.cli import Step, add_engine_flag, ending, engine_options, publish, steps
from benchmarks.concurrency import random_prompts
from benchmarks.contenders import Answer, Measure
from benchmarks.figures import compare
from benchmarks.harness import PATIENCE_S
from benchmarks.protect_contenders import Contenders
from benchmarks.protect_table import show
from benchmarks.rounds import alternate, how_quiet, used, verdict
from benchmarks.turns import Limits

NONE, FULL, PEER, INSIDE, TRANSFORMERS = "none", "full", "full, peer", "int8 inside", "transformers"
LEVELS = (NONE, "verify", "mask", FULL)
AIMS = {"decode": (FULL, 1.0), "prefill": (PEER, 2.0)}  # the contender, and at most so many times none
MASK_MEMORY = "1536M"  # SmolLM2's masks for 1024 tokens, and its weights


@dataclasses.dataclass(frozen=True)
class Work:
    """How much of everything."""

    prompt_tokens: int = 64
    new_tokens: int = 65
    prefill_tokens: int = 1024
    bank_tokens: int = 512
    sustained_tokens: int = 2000
    fewest_requests: int = 1
    requests: int = 8

    @classmethod
    def quick(cls) -> Work:
        return cls(16, 5, 48, 8, 16, 2, 2)

    @property
    def decode(self) -> Measure:
        return Measure("decode", "ms/token", self.prompt_tokens, self.new_tokens, "rest_s", 1e3 / (self.new_tokens - 1))

    @property
    def prefill(self) -> Measure:
        return Measure("prefill", "ms", self.prefill_tokens, 1, "first_s", 1e3)

    @property
    def longest(self) -> int:
        return max(self.prefill_tokens, self.prompt_tokens + self.sustained_tokens)


def run(
    model: str, options: dict[str, Any], mask_memory: int, work: Work, limits: Limits, step: Step
) -> dict[str, Any]:
    """options: of all engines; mask_memory: of those that mask, in bytes."""
    spec = Checkpoint.find(model).spec
    names = [*LEVELS, PEER, INSIDE, TRANSFORMERS]
    patience_s = min(PATIENCE_S, limits.seconds / 20)
    prompts = random_prompts(spec.vocab_size, work.requests, work.longest)
    contenders = Contenders(model, options, mask_memory, prompts, patience_s)
    results: dict[str, Any] = {}
    with contenders.loaded(names, step):
        results["bank"] = _bank(spec, contenders, work, step)
        for measure in (work.decode, work.prefill):
            results[measure.name] = _timed(contenders, names, measure, limits, step)
    results["sustained"] = _sustained(
        contenders, [name for name in names if name not in ("verify", "mask")], work, step
    )
    return results


def _bank(spec: ModelSpec, contenders: Contenders, work: Work, step: Step) -> dict[str, float]:
    step("bank")
    made = contenders.prepare(FULL, work.bank_tokens)
    token_bytes = 4 * sum(spec.linears[op].out_features for op, _ in matrices(spec))
    return {
        "tokens": made["tokens"],
        "ms_per_token": 1e3 * made["seconds"] / made["tokens"],
        "bytes_per_token": token_bytes,
    }


def _timed(
    contenders: Contenders, names: Sequence[str], measure: Measure, limits: Limits, step: Step
) -> dict[str, Any]:
    contenders.warm_up(names, measure)
    rounds = alternate(
        names, lambda name: contenders.answer(name, measure), limits, lambda text: step(f"{measure.name}: {text}")
    )
    chosen = used(rounds)
    rows = {name: _row(chosen, name, measure) for name in names}
    aimed, most = AIMS[measure.name]
    reached = rows[aimed]["of_none"] <= most
    return {
        "unit": measure.unit,
        "contenders": rows,
        "aim": {"contender": aimed, "of_none": most},
        "verdict": verdict(reached, chosen),
        **how_quiet(rounds),
    }


def _row(rounds: Sequence[Mapping[str, Answer]], name: str, measure: Measure) -> dict[str, Any]:
    ours = [measure.value(taken[name]) for taken in rounds]
    against = {
        other: compare(ours, [measure.value(taken[other]) for taken in rounds])
        for other in (NONE, INSIDE, TRANSFORMERS)
    }
    return {
        "median": against[NONE].ours_median,
        "of_none": against[NONE].ratio,
        "interval": dataclasses.asdict(against[NONE].interval),
        "of_int8": against[INSIDE].ratio,
        "of_transformers": against[TRANSFORMERS].ratio,
        "masks": rounds[-1][name].get("masks"),
        "samples": ours,
    }


def _sustained(contenders: Contenders, names: Sequence[str], work: Work, step: Step) -> dict[str, Any]:
    """Each contender once, just loaded: it takes minutes, and is its own average."""
    found = {}
    for requests in sorted({work.fewest_requests, work.requests}):
        rows = {}
        for name in names:
            step(f"sustained, {requests} at once: {name}")
            answer = contenders.sustained(name, requests, work.prompt_tokens, work.sustained_tokens // requests)
            rows[name] = {
                "tokens": answer["tokens"],
                "tokens_per_s": answer["tokens"] / answer["seconds"],
                "cpu_ms_per_token": 1e3 * answer["cpu_s"] / answer["tokens"],
                "others_share": answer["others_share"],
            }
        found[str(requests)] = rows
    return found


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="benchmarks.protect", description="What --protect costs.")
    parser.add_argument("--model", metavar="MODEL", help="a checkpoint (default: the demo model)")
    parser.add_argument("--quick", action="store_true", help="a twentieth of the work, once: to see that it works")
    parser.add_argument(
        "--mask-memory", default=MASK_MEMORY, metavar="SIZE", help=f"of what masks (default: {MASK_MEMORY})"
    )
    parser.add_argument(
        "--sustained-tokens",
        type=int,
        default=Work.sustained_tokens,
        metavar="N",
        help=f"from a cold bank, in all (default: {Work.sustained_tokens})",
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="(default: 5)")
    parser.add_argument("--limit-s", type=float, default=300, metavar="N", help="of each measure (default: 300)")
    add_engine_flag(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there too")
    return parser


def _report(arguments: argparse.Namespace) -> dict[str, Any]:
    options = engine_options(arguments.engine)
    if arguments.rounds < 1:
        raise BadInputError("--rounds is at least 1")
    if "protect" in options or "dtype" in options:
        raise BadInputError("--engine: protect and dtype are what is compared here")
    work = Work.quick() if arguments.quick else Work(sustained_tokens=arguments.sustained_tokens)
    limits = Limits(1, 0) if arguments.quick else Limits(arguments.rounds, arguments.limit_s)
    model = arguments.model or str(demo_model.prepare())
    most = Checkpoint.find(model).spec.max_positions
    if work.longest > most:
        raise BadInputError(f"{work.longest} tokens are needed, the model's context is {most}")
    memory = parse_size(arguments.mask_memory)
    settings = {"model": Path(model).name, "engine": options, "mask_memory": memory}
    settings |= dataclasses.asdict(work) | dataclasses.asdict(limits)
    described = machine.describe()
    with steps(20 + 2 * limits.rounds, lines=True) as step:
        results = run(model, options, memory, work, limits, step)
    return {"benchmark": "protect", "machine": described, "settings": settings, "results": results}


def _print(report: Mapping[str, Any], out: Path | None) -> None:
    show(report, Console(width=None if sys.stdout.isatty() else 120))
    publish(report, out)


def main(words: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(words)
    with ending("benchmarks.protect", demo_model.DemoModelError) as end:
        _print(_report(arguments), arguments.out)
    return end.code


if __name__ == "__main__":
    sys.exit(main())
