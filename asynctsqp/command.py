"""What `python -m asynctsqp.tee` does once its arguments are known to be good: one answer, or a chat."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import signal
import sys
from collections.abc import Sequence
from typing import Any

import msgspec

from asynctsqp.chat import chat
from asynctsqp.config import EngineOptions
from asynctsqp.engine import Engine
from asynctsqp.layouts import OPERATIONS
from asynctsqp.model_spec import Op
from asynctsqp.reports.clock import ClockOffset
from asynctsqp.reports.stats_table import rendered
from asynctsqp.summary import summary
from tee_side.request import Completion, Piece, Progress


async def run(arguments: argparse.Namespace) -> None:
    """arguments: as tee.py parsed and checked them."""
    task = asyncio.current_task()
    if task is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    _warn(arguments.options)
    sampling = dataclasses.asdict(arguments.sampling)
    async with _engine(arguments) as engine:
        if arguments.text is None:
            await chat(engine, sampling)
        else:
            prompt = [{"role": "user", "content": arguments.text}] if arguments.chat else arguments.text
            await _answer(engine, prompt, sampling, arguments.json)
    if engine.clock is not None:
        print(f"asynctsqp.tee: {arguments.options.trace}: {_said(engine.clock)}", file=sys.stderr)


def _warn(options: EngineOptions) -> None:
    """One line about what the GPU side can read, if it can."""
    if options.protect != "none":
        return
    seen = "the activations"
    if options.partition != "shielded":
        seen += " and more than linears need"
    if Op.EMBEDDING in OPERATIONS[options.partition]:
        seen = "the token ids, the attention and the activations"
    flags = "--protect none" if options.partition == "shielded" else f"--protect none, --partition {options.partition}"
    print(f"asynctsqp.tee: warning: {flags}: the GPU side can read {seen}", file=sys.stderr)


def _engine(arguments: argparse.Namespace) -> Engine:
    options = dataclasses.asdict(arguments.options)
    if arguments.gpu is None:
        return Engine.launch(arguments.model, **options)
    return Engine.connect(arguments.model, arguments.gpu, **options)


async def _answer(engine: Engine, prompt: str | list[dict[str, str]], sampling: dict[str, Any], as_json: bool) -> None:
    progress = Progress()
    pieces: list[Piece] = []
    async with contextlib.aclosing(engine.generate(prompt, progress=progress, **sampling)) as stream:
        async for piece in stream:
            pieces.append(piece)
            if not as_json:
                print(piece.text, end="", flush=True)
    if as_json:
        print(_json(engine, pieces, progress, sampling))
        return
    print(flush=True)
    print(summary(progress), file=sys.stderr)
    if progress.stats is not None:
        print(rendered(progress.stats), file=sys.stderr)


def _said(clock: ClockOffset) -> str:
    if clock.error_s is None:
        return "no calls, so the GPU side's clock is not known"
    return f"the GPU side's clock is known to {1e6 * clock.error_s:.0f} us"


def _json(engine: Engine, pieces: Sequence[Piece], progress: Progress, sampling: dict[str, Any]) -> str:
    result = dataclasses.asdict(Completion.of(pieces, progress))
    if result["stats"] is None:
        del result["stats"]
    result["config"] = dataclasses.asdict(engine.options) | sampling
    return msgspec.json.encode(result).decode()
