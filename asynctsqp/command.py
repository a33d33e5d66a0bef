"""What `python -m asynctsqp.tee` does once its arguments are known to be good: one answer, a chat, or a service."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from asynctsqp.attestation.evidence import Attestation, quoter
from asynctsqp.chat import chat
from asynctsqp.config import EngineOptions
from asynctsqp.endpoints import same_host
from asynctsqp.engine import Engine
from asynctsqp.errors import AttestationError
from asynctsqp.filling import Report
from asynctsqp.filling_line import FillingLine
from asynctsqp.layouts import OPERATIONS
from asynctsqp.model_spec import Op
from asynctsqp.printable import printable
from asynctsqp.reports.clock import ClockOffset
from asynctsqp.reports.stats_table import rendered
from asynctsqp.summary import summary
from tee_side.request import Completion, Piece, Progress

if TYPE_CHECKING:
    from asynctsqp.service.attestation import Binding  # of an optional dependency group
FIRST_MASKS = 256  # tokens that there are masks for before the first answer begins: the bank makes as many at once


async def run(arguments: argparse.Namespace) -> None:
    """arguments: as tee.py parsed and checked them."""
    task = asyncio.current_task()
    if task is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    _warn(arguments.options)
    _warn_of_one_party(arguments.gpu, arguments.options.mask_peer)
    if arguments.serve is not None:
        await _serve(arguments)
        return
    sampling = dataclasses.asdict(arguments.sampling)
    async with _running(arguments, min(arguments.sampling.max_new_tokens, FIRST_MASKS)) as engine:
        if arguments.text is None:
            await chat(engine, sampling)
        else:
            prompt = [{"role": "user", "content": arguments.text}] if arguments.chat else arguments.text
            await _answer(engine, prompt, sampling, arguments.json)
    if engine.clock is not None:
        print(f"asynctsqp.tee: {arguments.options.trace}: {_said(engine.clock)}", file=sys.stderr)


async def _serve(arguments: argparse.Namespace) -> None:
    """Until SIGTERM. Raises CancelledError after SIGINT, when all is closed."""
    from asynctsqp.service.server import Door, serve  # of an optional dependency group

    door = Door(arguments.address, arguments.service, arguments.options)
    try:
        async with _running(arguments, FIRST_MASKS) as engine:
            evidence = _evidence(door.binding(engine)) if arguments.options.enclave else None
            ended_by = await serve(door, engine, _name(arguments.model), arguments.sampling, evidence)
    finally:
        door.close()
    if ended_by == signal.SIGINT:
        raise asyncio.CancelledError


def _evidence(binding: Binding) -> Attestation | None:
    """What clients can check us by; where there is nothing, one line says so, and GET /attestation as well."""
    try:
        return Attestation(quoter(), binding.key_hash, binding.configuration)
    except AttestationError as error:
        print(f"asynctsqp.tee: warning: {error}", file=sys.stderr)
        return None


def _name(model: str) -> str:
    """Of a model, for clients of the service: the directory's, or what it is called at the hub."""
    return Path(model).resolve().name if os.path.isdir(model) else model


def _warn(options: EngineOptions) -> None:
    """One line about what the GPU side can read, if it can."""
    if options.protect in ("mask", "full"):
        return
    seen = "the activations"
    if options.partition != "shielded":
        seen += " and more than linears need"
    if Op.EMBEDDING in OPERATIONS[options.partition]:
        seen = "the token ids, the attention and the activations"
    flags = f"--protect {options.protect}"
    if options.partition != "shielded":
        flags += f", --partition {options.partition}"
    print(f"asynctsqp.tee: warning: {flags}: the GPU side can read {seen}", file=sys.stderr)


def _warn_of_one_party(gpu: str | None, peer: str | None) -> None:
    if peer is not None and same_host(gpu, peer):
        print(
            "asynctsqp.tee: warning: the GPU side and the mask peer are on one host, as their endpoints say: whoever "
            "runs it can put what they see together and read everything",
            file=sys.stderr,
        )


@contextlib.asynccontextmanager
async def _running(arguments: argparse.Namespace, masks: int) -> AsyncIterator[Engine]:
    """masks: tokens that there are some for before anything is asked."""
    filling = FillingLine()
    async with contextlib.AsyncExitStack() as opened:
        with filling:
            engine = await opened.enter_async_context(_engine(arguments, filling))
            await engine.prepare_masks(masks)
        yield engine


def _engine(arguments: argparse.Namespace, report: Report) -> Engine:
    return Engine(
        arguments.model, arguments.gpu, dataclasses.asdict(arguments.options), report, started=arguments.gpu_side
    )


async def _answer(engine: Engine, prompt: str | list[dict[str, str]], sampling: dict[str, Any], as_json: bool) -> None:
    progress = Progress()
    pieces: list[Piece] = []
    shown = printable if sys.stdout.isatty() else str  # a GPU side may have a hand in it; a file gets it as it is
    async with contextlib.aclosing(engine.generate(prompt, progress=progress, **sampling)) as stream:
        async for piece in stream:
            pieces.append(piece)
            if not as_json:
                print(shown(piece.text), end="", flush=True)
    if as_json:
        print(shown(_json(engine, pieces, progress, sampling)))
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
    del result["logprobs"]
    if result["stats"] is None:
        del result["stats"]
    result["config"] = dataclasses.asdict(engine.options) | sampling
    return msgspec.json.encode(result).decode()
