"""`python -m asynctsqp.tee`: the TEE side as a process."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Read by OpenMP when torch loads it. Waiting threads must sleep: the other side may need the core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import msgspec

from asynctsqp.chat import chat
from asynctsqp.config import EngineOptions, OneLineParser, SamplingOptions, add_arguments, from_arguments
from asynctsqp.engine import Engine
from asynctsqp.errors import AsynctsqpError, BadInputError, NotBuiltError, PromptError
from asynctsqp.summary import summary
from tee_side.request import Completion, Piece, Progress

INTERRUPTED = 130


def main() -> int:
    try:
        arguments = _parser().parse_args()
        options, sampling = (
            from_arguments(EngineOptions, arguments),
            from_arguments(SamplingOptions, arguments),
        )
        if arguments.serve is not None:
            raise NotBuiltError("--serve is not built yet")
        asyncio.run(_run(arguments, dataclasses.asdict(options), dataclasses.asdict(sampling)))
    except AsynctsqpError as error:
        print(f"asynctsqp.tee: error: {error}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("asynctsqp.tee: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read standard output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="asynctsqp.tee", description="Answer a prompt with the heavy products elsewhere.")
    parser.add_argument("--model", required=True, metavar="DIR_OR_HUB_ID")
    parser.add_argument("--gpu", metavar="ENDPOINT", help="of a GPU side (default: start a local one, and stop it)")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="default: standard input; a chat where that is a terminal")
    prompt.add_argument("--prompt-file", metavar="PATH")
    parser.add_argument("--chat", action="store_true", help="apply the model's chat template to the prompt")
    parser.add_argument("--serve", metavar="HOST:PORT", help="an HTTP service")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output, at the end")
    add_arguments(parser, SamplingOptions)
    add_arguments(parser, EngineOptions)
    return parser


async def _run(arguments: argparse.Namespace, options: dict[str, Any], sampling: dict[str, Any]) -> None:
    task = asyncio.current_task()
    if task is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    interactive = arguments.prompt is None and arguments.prompt_file is None and sys.stdin.isatty()
    if interactive and arguments.json:
        raise BadInputError("--json needs a prompt: give --prompt or --prompt-file")
    prompt = None if interactive else _prompt(arguments)
    if options["protect"] == "none":
        print("asynctsqp.tee: warning: --protect none: the GPU side can read the activations", file=sys.stderr)
    engine = (
        Engine.connect(arguments.model, arguments.gpu, **options)
        if arguments.gpu
        else Engine.launch(arguments.model, **options)
    )
    async with engine:
        if prompt is None:
            await chat(engine, sampling)
        else:
            await _answer(engine, prompt, sampling, arguments.json)


def _prompt(arguments: argparse.Namespace) -> str | list[dict[str, str]]:
    text = _text(arguments)
    if not text:
        raise PromptError("the prompt is empty")
    return [{"role": "user", "content": text}] if arguments.chat else text


def _text(arguments: argparse.Namespace) -> str:
    if arguments.prompt is not None:
        return str(arguments.prompt)
    try:
        return sys.stdin.read() if arguments.prompt_file is None else Path(arguments.prompt_file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        source = arguments.prompt_file or "standard input"
        raise BadInputError(f"cannot read the prompt from {source}: {error}") from None


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


def _json(engine: Engine, pieces: Sequence[Piece], progress: Progress, sampling: dict[str, Any]) -> str:
    result = dataclasses.asdict(Completion.of(pieces, progress))
    result["config"] = dataclasses.asdict(engine.options) | sampling
    return msgspec.json.encode(result).decode()


if __name__ == "__main__":
    sys.exit(main())
