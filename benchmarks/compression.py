"""When compressing what travels between the sides pays: `--compress lz4` and `zstd`.

    python -m benchmarks.compression [--model DIR] [--rounds N] [--tokens N] [--link-tokens N] [--out FILE]

Measured, on real activations: the project's own English texts go through the model, and the bytes of the tensor
messages are kept, uncompressed, of six layers spread over the depth (benchmarks.compression_recorder).

- ratio and speed: for each operation, direction and dtype, what the product's own Compression makes of the payloads
  of --tokens tokens, and how long either end takes, on one thread, in MB/s of raw bytes; medians. A payload of up to
  1 MiB is never compressed: its ratio is 1. QK and AV are those of the partition `batched`, the others those of
  `shielded`; LM_HEAD is asked for all tokens' scores, while an answer asks for those of the last token only.
- break-even, computed: the link on which the bytes saved take as long as compressing and decompressing, one after
  the other, for each row and for a whole prefill of --link-tokens tokens.
- break-even, measured: ms to the first token of an answer to a prompt of --link-tokens tokens, through a proxy that
  holds each direction to a rate (benchmarks.throttle), to a real GPU side; without compression, lz4, zstd, at every
  rate, in turns, --rounds times. Where the time saved becomes none is interpolated. What the proxy lets through is
  measured beside it by a plain transfer of half a second each way.

The two break-evens differ by what the computed one leaves out: waits for a free core (both sides, the proxy and the
compression share this machine), a block's compression while another block travels, hand-over between threads.

Not measured: a link's latency and losses, float16 through the proxy (it has bfloat16's sizes), decoding (its payloads
are far below 1 MiB), masked tensors (which no compression makes smaller), several requests at once, a CUDA device.
With the demo model and three rounds it takes about a quarter of an hour.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.config import OneLineParser
from asynctsqp.cores import openmp
from asynctsqp.errors import BadInputError
from benchmarks import compression_links, demo_model, machine
from benchmarks.cli import Step, ending, publish, steps
from benchmarks.compression_table import show
from benchmarks.harness import Worker

DTYPES = ("float32", "bfloat16", "float16")
LINK_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Settings:
    """tokens: of the recorded pass; link_tokens: of the prefill through the proxy."""

    model: str
    rounds: int
    tokens: int
    link_tokens: int


def run(settings: Settings) -> dict[str, Any]:
    """All results. Raises WorkerFailed, OSError."""
    total = len(DTYPES) + len(LINK_DTYPES) * (1 + settings.rounds)
    with (
        compression_links.gpu_side(settings.model) as gpu,
        _tee_side() as tee,
        compression_links.network(gpu) as net,
        steps(total) as step,
    ):
        tokens = tee.ask("tokens", model=settings.model, count=max(settings.tokens, settings.link_tokens))["tokens"]
        recorded = {dtype: _recorded(tee, gpu, settings, dtype, tokens, step) for dtype in DTYPES}
        links = {dtype: _links(tee, gpu, net, settings, dtype, tokens, step) for dtype in LINK_DTYPES}
    return {"activations": recorded, "links": links}


def _tee_side() -> Worker:
    """With what `python -m asynctsqp.tee` adds to its environment."""
    added = {name: value for name, value in openmp().items() if name not in os.environ}
    return Worker("the TEE side", "benchmarks.compression_worker", added)


def _recorded(
    tee: Worker, gpu: str, settings: Settings, dtype: str, tokens: list[int], step: Step
) -> list[dict[str, Any]]:
    step(f"{dtype}: activations")
    wanted = tokens[: settings.tokens]
    rows: list[dict[str, Any]] = tee.ask(
        "activations", model=settings.model, endpoint=gpu, dtype=dtype, tokens=wanted, attention=True
    )["rows"]
    return rows


def _links(
    tee: Worker,
    gpu: str,
    net: compression_links.Network,
    settings: Settings,
    dtype: str,
    tokens: list[int],
    step: Step,
) -> dict[str, Any]:
    """The same tokens, computed from what they send and measured."""
    step(f"{dtype}: the prefill's activations")
    prompt = tokens[: settings.link_tokens]
    computed = tee.ask("activations", model=settings.model, endpoint=gpu, dtype=dtype, tokens=prompt, attention=False)[
        "prefill"
    ]
    measured = compression_links.measure(tee, net, settings.model, dtype, prompt, settings.rounds, step)
    return {"computed": computed, **measured}


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="benchmarks.compression", description="When compression between the sides pays.")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint (default: the demo model)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="through the proxy (default: 3)")
    parser.add_argument("--tokens", type=int, default=1024, metavar="N", help="whose activations (default: 1024)")
    parser.add_argument(
        "--link-tokens", type=int, default=512, metavar="N", help="of a prefill through the proxy (default: 512)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there too")
    return parser


def _settings(arguments: argparse.Namespace) -> Settings:
    if min(arguments.rounds, arguments.tokens, arguments.link_tokens) < 1:
        raise BadInputError("--rounds, --tokens and --link-tokens are at least 1")
    model = str(arguments.model or demo_model.prepare())
    most = Checkpoint.find(model).spec.max_positions - 1
    if max(arguments.tokens, arguments.link_tokens) > most:
        raise BadInputError(f"--tokens and --link-tokens are at most {most}: the model's context, less one")
    return Settings(model, arguments.rounds, arguments.tokens, arguments.link_tokens)


def _report(settings: Settings) -> dict[str, Any]:
    described = machine.describe()
    results = run(settings)
    return {
        "benchmark": "compression",
        "machine": described,
        "settings": dataclasses.asdict(settings),
        "results": results,
    }


def _print(report: Mapping[str, Any], out: Path | None) -> None:
    show(report, Console(width=None if sys.stdout.isatty() else 120))
    publish(report, out)


def main(words: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(words)
    with ending("benchmarks.compression", demo_model.DemoModelError) as end:
        _print(_report(_settings(arguments)), arguments.out)
    return end.code


if __name__ == "__main__":
    sys.exit(main())
