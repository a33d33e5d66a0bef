"""What integer weights and masks cost in quality: the scores of --protect full beside those of float32.

    python -m benchmarks.quality [--model MODEL] [--text FILE] [--tokens N] [--window N] [--weight-bits 8|12]...
                                 [--engine KEY=VALUE]... [--out FILE]

One engine with --protect none in float32, and one with --protect full for each number of bits, give the scores after
each token of the same windows of text, through the real GPU side. Over all tokens but the first of each window:

- perplexity: exp of the mean of -log p(next token), and its ratio to float32's. The aims are at most 1.005 with 8 bits
  and 1.0005 with 12. `error` is the standard error of the ratio, from the differences token by token.
- divergence: the mean Kullback-Leibler divergence of float32's distribution from it, in nats.
- agreement: how often both find the same token the likeliest.

The text is, unless --text names another, Python's own documentation as CPython carries it (pydoc_data.topics): English
prose with some code, which is there without a network. The result says which text it was, and its hash.

Nothing is timed. Masks change nothing by themselves, they are exact; what is measured is the rounding of weights and
activations, and --protect verify would give the same scores to the last bit.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from asynctsqp import Engine
from asynctsqp.checkpoint import Checkpoint
from asynctsqp.config import OneLineParser
from asynctsqp.errors import BadInputError
from benchmarks import demo_model, machine
from benchmarks.cli import Step, add_engine_flag, ending, engine_options, publish, steps
from tee_side.tokenizer import Tokenizer

AIMS = {8: 1.005, 12: 1.0005}  # of the perplexity, as a part of float32's
BITS = tuple(AIMS)


@dataclass
class Losses:
    """One engine's figures, token by token."""

    nll: list[torch.Tensor] = field(default_factory=list)
    divergence: list[torch.Tensor] = field(default_factory=list)
    same: list[torch.Tensor] = field(default_factory=list)

    def add(self, scores: torch.Tensor, reference: torch.Tensor, following: torch.Tensor) -> None:
        """scores, reference: [n, vocab], logarithms of probabilities; following: [n], the tokens that came."""
        self.nll.append(-scores.gather(1, following.unsqueeze(1)).squeeze(1).double())
        self.divergence.append((reference.exp() * (reference - scores)).sum(dim=1).double())
        self.same.append((scores.argmax(dim=1) == reference.argmax(dim=1)).double())

    def figures(self, reference: Losses) -> dict[str, float]:
        ours, theirs = torch.cat(self.nll), torch.cat(reference.nll)
        difference = ours - theirs
        ratio = math.exp(float(difference.mean()))
        return {
            "perplexity": math.exp(float(ours.mean())),
            "ratio": ratio,
            "error": ratio * float(difference.std()) / math.sqrt(len(difference)),
            "divergence": float(torch.cat(self.divergence).mean()),
            "agreement": float(torch.cat(self.same).mean()),
        }


async def run(
    model: str, windows: Sequence[Sequence[int]], bits: Sequence[int], options: Mapping[str, Any], step: Step
) -> dict[str, Any]:
    """windows: tokens; options: of the engines that protect."""
    kinds: dict[str, dict[str, Any]] = {"float32": {"protect": "none"}}
    kinds |= {f"full, {count} bits": {"protect": "full", "weight_bits": count, **options} for count in bits}
    losses = {name: Losses() for name in kinds}
    async with contextlib.AsyncExitStack() as opened:
        engines = {}
        for name, chosen in kinds.items():
            step(f"loading: {name}")
            engines[name] = await opened.enter_async_context(Engine.launch(model, **chosen))
        for number, tokens in enumerate(windows):
            following, reference = torch.tensor(tokens[1:]), torch.empty(0)
            for name, engine in engines.items():
                step(f"window {number + 1}: {name}")
                scores = torch.log_softmax((await engine.logits(tokens))[:-1], dim=1)
                reference = scores if name == "float32" else reference
                losses[name].add(scores, reference, following)
    figures = {name: found.figures(losses["float32"]) for name, found in losses.items()}
    verdicts = {
        f"full, {count} bits": "reached" if figures[f"full, {count} bits"]["ratio"] <= AIMS[count] else "missed"
        for count in bits
    }
    return {"levels": figures, "verdicts": verdicts, "predicted_tokens": sum(len(tokens) - 1 for tokens in windows)}


def read_text(file: Path | None) -> tuple[str, str]:
    """-> what it is, and the text."""
    if file is not None:
        return file.name, file.read_text()
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return f"pydoc_data.topics of Python {version}", "\n\n".join(topics[name] for name in sorted(topics))


def cut(tokens: Sequence[int], count: int, window: int) -> list[list[int]]:
    """Windows that follow each other, so many that `count` tokens are predicted. Raises BadInputError."""
    number = -(-count // (window - 1))
    if number * window > len(tokens):
        raise BadInputError(f"the text has {len(tokens)} tokens, {number * window} are needed: give a longer --text")
    return [list(tokens[start * window : (start + 1) * window]) for start in range(number)]


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="benchmarks.quality", description="The scores of --protect full beside float32's.")
    parser.add_argument("--model", metavar="MODEL", help="a checkpoint (default: the demo model)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="(default: Python's own documentation)")
    parser.add_argument("--tokens", type=int, default=10_000, metavar="N", help="predicted, at least (default: 10000)")
    parser.add_argument("--window", type=int, default=1024, metavar="N", help="tokens that see each other (1024)")
    parser.add_argument(
        "--weight-bits", type=int, choices=BITS, action="append", help="may be given again (default: both)"
    )
    add_engine_flag(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there too")
    return parser


def _report(arguments: argparse.Namespace) -> dict[str, Any]:
    options, bits = engine_options(arguments.engine), sorted(set(arguments.weight_bits or BITS))
    if arguments.tokens < 1 or arguments.window < 2:
        raise BadInputError("--tokens is at least 1, --window 2")
    model = arguments.model or str(demo_model.prepare())
    checkpoint = Checkpoint.find(model)
    if arguments.window > checkpoint.spec.max_positions:
        raise BadInputError(f"--window is at most {checkpoint.spec.max_positions} for this model")
    source, text = read_text(arguments.text)
    tokens = Tokenizer(checkpoint.directory, checkpoint.spec.vocab_size).encode(text)
    windows = cut(tokens, arguments.tokens, arguments.window)
    described = machine.describe()
    with steps((1 + len(bits)) * (1 + len(windows)), lines=True) as step:
        results = asyncio.run(run(model, windows, bits, options, step))
    settings = {
        "model": Path(model).name,
        "engine": options,
        "text": source,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "window": arguments.window,
        "windows": len(windows),
    }
    aims = {str(count): AIMS[count] for count in bits}
    return {"benchmark": "quality", "machine": described, "settings": settings, "aims": aims, "results": results}


def _print(report: Mapping[str, Any], out: Path | None) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(machine.summary(report["machine"]), highlight=False, soft_wrap=True)
    console.print(_table(report["settings"], report["results"]))
    publish(report, out)


def _table(settings: Mapping[str, Any], results: Mapping[str, Any]) -> Table:
    title = f"{results['predicted_tokens']} tokens of {settings['text']}, windows of {settings['window']}"
    table = Table("", title=title, title_justify="left")
    for heading in ("perplexity", "to float32's", "aim", "divergence", "same likeliest token"):
        table.add_column(heading, justify="right")
    for name, row in results["levels"].items():
        verdict = results["verdicts"].get(name, "")
        ratio = f"{row['ratio']:.5f} +- {row['error']:.5f}"
        cells = (
            f"{row['perplexity']:.4f}",
            ratio,
            verdict,
            f"{row['divergence']:.6f}",
            f"{100 * row['agreement']:.2f} %",
        )
        table.add_row(name, *cells)
    return table


def main(words: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(words)
    with ending("benchmarks.quality", demo_model.DemoModelError, UnicodeDecodeError) as end:
        _print(_report(arguments), arguments.out)
    return end.code


if __name__ == "__main__":
    sys.exit(main())
