"""This project and `transformers`, side by side on one CUDA device.

    python -m benchmarks.cuda [--model DIR|random:NAME]... [--partition NAME]... [--lanes N]... [--dtype NAME]...
                              [--prompt-tokens N] [--rounds N] [--limit-s N] [--out FILE]

Measured per model, dtype, partition and number of lanes, as the caller of either library in a warm process sees it:

- decode: ms per token, from the first to the 65th token of a greedy answer to a 64-token prompt.
- prefill: s to the first token of the answer to a prompt of --prompt-tokens (1024).
- GPU busy: the time that the GPU side computed, by this project's own records, over the time that was measured:
  programs between two events of the device, without the transfers around them. The records are on all the while.
- transformers, on the same device in the same dtype, by turns with this project: `generate` in inference mode with its
  defaults (no static cache, nothing compiled) and the attention that was faster in the warm-up.

The aims that stand beside the figures are for one H200.

Each contender has processes of its own. They take turns, A B A B, and who is not measured is stopped: its weights stay
on the device, so that both must fit. benchmarks.baseline says what a disturbed pair is. --limit-s bounds the rounds of
one setting; each measure is taken at least once. For `random:NAME` transformers gets the same tensors as the engine;
in 16 bits the two may say other tokens all the same, for both round, each its own way.

Not measured: several requests at once, a network, an enclave, masks, loading. Without a CUDA device it measures nothing
and ends with 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.config import OneLineParser
from asynctsqp.errors import BadInputError
from asynctsqp.layouts import OPERATIONS
from asynctsqp.limits import MAX_LANES, WIRE_DTYPE_NAMES
from benchmarks import machine
from benchmarks.cli import Step, ending, publish, steps
from benchmarks.communication import communication_share, gpu_share
from benchmarks.contenders import Measure, Split, Transformers, random_prompt
from benchmarks.cuda_table import show
from benchmarks.harness import PATIENCE_S
from benchmarks.turns import Limits, Pair, Pairs, take_turns, times, used

MODELS = ("random:llama-3.2-1b", "random:llama-3.1-8b")
PARTITIONS = ("shielded", "fused-layer")
DTYPE = "bfloat16"
STEPS = 64  # of decoding
DECODE_PROMPT = 64
PROMPT_TOKENS = 1024  # of a prefill
BESIDES_ROUNDS = 2  # steps of a setting: loading, warm-up

# at most, on one H200: ms per token, s for 1024 tokens
AIMS = {
    ("random:llama-3.2-1b", "shielded"): {"decode": 3.0, "prefill": 0.15},
    ("random:llama-3.2-1b", "fused-layer"): {"decode": 1.5, "prefill": 0.15},
}

Result = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One engine. lanes: None lets it choose."""

    model: str
    dtype: str
    partition: str
    lanes: int | None

    def options(self) -> dict[str, Any]:
        return {"partition": self.partition, "lanes": self.lanes, "stats": True}

    @property
    def name(self) -> str:
        return f"{self.model}, {self.dtype}, {self.partition}, {self.lanes or 'chosen'} lanes"


@dataclass(frozen=True)
class Run:
    """What all settings have in common. device: of transformers; the GPU side takes the CUDA device if there is one."""

    prompt_tokens: int
    limits: Limits
    device: str

    @property
    def measures(self) -> tuple[Measure, Measure]:
        return (
            Measure("decode", "ms/token", min(DECODE_PROMPT, self.prompt_tokens), STEPS + 1, "rest_s", 1e3 / STEPS),
            Measure("prefill", "s", self.prompt_tokens, 1, "first_s", 1.0),
        )

    @property
    def patience_s(self) -> float:
        return min(PATIENCE_S, self.limits.seconds / 10)


def measured(run: Run, settings: Sequence[Setting], step: Step) -> Iterator[Result]:
    """One result a setting. They come sorted by model and dtype: one transformers for each."""
    for (model, dtype), group in itertools.groupby(settings, lambda setting: (setting.model, setting.dtype)):
        prompt = random_prompt(Checkpoint.find(model).spec, run.prompt_tokens)
        with Transformers.worker(run.patience_s) as worker:
            step(f"transformers, {model}, {dtype}")
            worker.ask("load", model=model, dtype=dtype, device=run.device)
            transformers = Transformers(worker, prompt)
            transformers.warm_up(run.measures)
            for setting in group:
                yield _setting(run, setting, prompt, transformers, step)


def _setting(run: Run, setting: Setting, prompt: list[int], transformers: Transformers, step: Step) -> Result:
    """From loading to the figures."""
    with Split.worker(run.patience_s) as worker:
        step(f"{setting.name}: loading")
        worker.ask("load", model=setting.model, dtype=setting.dtype, options=setting.options())
        split = Split(worker, prompt)
        step(f"{setting.name}: warm-up")
        split.warm_up(run.measures)
        pairs = take_turns(split, transformers, run.measures, run.limits, lambda text: step(f"{setting.name}: {text}"))
    return {
        **dataclasses.asdict(setting),
        "attention": dict(transformers.attention),
        "same_tokens": _same_tokens(pairs),
        **{measure.name: _figures(setting, measure, pairs[measure.name]) for measure in run.measures},
    }


def _figures(setting: Setting, measure: Measure, pairs: Sequence[Pair]) -> Result:
    answers = [pair.ours for pair in used(pairs)]
    return {
        "aim": _aim(setting, measure),
        "gpu_share": statistics.median(gpu_share(answer, measure.key) for answer in answers),
        "communication_share": statistics.median(communication_share(answer, measure.key) for answer in answers),
        **times(measure, pairs),
    }


def _aim(setting: Setting, measure: Measure) -> float | None:
    """None for what no aim was set for: another dtype, another length of prompt."""
    if setting.dtype != DTYPE or (measure.name == "prefill" and measure.prompt_tokens != PROMPT_TOKENS):
        return None
    return AIMS.get((setting.model, setting.partition), {}).get(measure.name)


def _same_tokens(pairs: Pairs) -> bool:
    return all(pair.ours["token_ids"] == pair.theirs["token_ids"] for taken in pairs.values() for pair in taken)


def _device() -> dict[str, Any]:
    """What both contenders take, and whose CUDA it is."""
    properties = torch.cuda.get_device_properties(0)
    return {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="benchmarks.cuda", description="This project and transformers on one CUDA device.")
    again = "may be given again"
    parser.add_argument("--model", action="append", metavar="MODEL", help=f"{again} (default: {' '.join(MODELS)})")
    parser.add_argument(
        "--partition", choices=tuple(OPERATIONS), action="append", help=f"{again} (default: {' '.join(PARTITIONS)})"
    )
    parser.add_argument("--lanes", type=int, action="append", metavar="N", help=f"{again} (default: chosen)")
    parser.add_argument("--dtype", choices=WIRE_DTYPE_NAMES, action="append", help=f"{again} (default: {DTYPE})")
    parser.add_argument(
        "--prompt-tokens", type=int, default=PROMPT_TOKENS, metavar="N", help="of a prefill (default: 1024)"
    )
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="(default: 7)")
    parser.add_argument("--limit-s", type=float, default=60, metavar="N", help="for one setting (default: 60)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there too")
    return parser


def _settings(arguments: argparse.Namespace) -> list[Setting]:
    lanes: list[int | None] = arguments.lanes or [None]
    if min(arguments.rounds, arguments.prompt_tokens, *(count for count in lanes if count is not None)) < 1:
        raise BadInputError("--rounds, --prompt-tokens and --lanes are at least 1")
    if any(count is not None and count > MAX_LANES for count in lanes):
        raise BadInputError(f"--lanes is at most {MAX_LANES}")
    models = tuple(dict.fromkeys(arguments.model or MODELS))
    most = min(Checkpoint.find(model).spec.max_positions for model in models) - STEPS - 1
    if arguments.prompt_tokens > most:
        raise BadInputError(f"--prompt-tokens is at most {most} for these models")
    dtypes, partitions = arguments.dtype or (DTYPE,), arguments.partition or PARTITIONS
    products = itertools.product(models, *(dict.fromkeys(words) for words in (dtypes, partitions, lanes)))
    return [Setting(*product) for product in products]


def _report(arguments: argparse.Namespace) -> Result:
    settings = _settings(arguments)
    if not torch.cuda.is_available():
        raise BadInputError("torch sees no CUDA device here: there is nothing to measure")
    run = Run(arguments.prompt_tokens, Limits(arguments.rounds, arguments.limit_s), "cuda:0")
    described = machine.describe() | _device()
    groups = len({(setting.model, setting.dtype) for setting in settings})
    with steps(groups + len(settings) * (BESIDES_ROUNDS + arguments.rounds), lines=True) as step:
        results = list(measured(run, settings, step))
    common = {"prompt_tokens": run.prompt_tokens, **dataclasses.asdict(run.limits)}
    return {"benchmark": "cuda", "machine": described, "settings": common, "results": results}


def main(words: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(words)
    with ending("benchmarks.cuda", ValueError) as end:
        report = _report(arguments)
        show(report, Console(width=None if sys.stdout.isatty() else 140))
        publish(report, arguments.out)
    return end.code


if __name__ == "__main__":
    sys.exit(main())
