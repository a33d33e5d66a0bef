"""`python -m asynctsqp.tee`: the TEE side as a process."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import importlib.util
import io
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import uvloop

from asynctsqp import enclave_mode
from asynctsqp.config import (
    MODEL_HELP,
    EngineOptions,
    OneLineParser,
    SamplingOptions,
    add_arguments,
    from_arguments,
)
from asynctsqp.cores import openmp
from asynctsqp.ending import at_once, ended, interrupted
from asynctsqp.endpoints import check_apart, check_endpoint
from asynctsqp.errors import BadInputError, PromptError
from asynctsqp.memory import keep_freed
from asynctsqp.service.options import Address, ServiceOptions
from tee_side.local_gpu import LocalGpuSide

SERVICE_MODULES = ("starlette", "uvicorn", "prometheus_client")  # the dependency group `serve`


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends us in order, as Ctrl-C does
    enclave_mode.no_core_dumps()
    return ended("asynctsqp.tee", _answer, "cannot write the answer")


def _answer() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # whatever the locale: an answer may hold any character
    arguments = _parser().parse_args()
    _check(arguments)
    _run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="asynctsqp.tee", description="Answer a prompt with the heavy products elsewhere.")
    parser.add_argument("--model", required=True, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--gpu", metavar="ENDPOINT", help="of a GPU side (default: start a local one, and stop it)")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="default: standard input; a chat where that is a terminal")
    prompt.add_argument("--prompt-file", metavar="PATH")
    parser.add_argument("--chat", action="store_true", help="apply the model's chat template to the prompt")
    parser.add_argument("--serve", metavar="HOST:PORT", help="an OpenAI-compatible HTTP service; see docs/service.md")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output, at the end")
    add_arguments(parser, SamplingOptions)
    add_arguments(parser, EngineOptions)
    add_arguments(parser, ServiceOptions)
    return parser


def _check(arguments: argparse.Namespace) -> None:
    """All that can be known to be wrong before anything is loaded."""
    arguments.enclave = arguments.enclave or enclave_mode.implied()
    if arguments.enclave:
        enclave_mode.hush()
    arguments.options = from_arguments(EngineOptions, arguments)
    arguments.sampling = from_arguments(SamplingOptions, arguments)
    if arguments.gpu is not None:
        check_endpoint("--gpu", arguments.gpu)
    check_apart(arguments.gpu, arguments.options.mask_peer)
    arguments.service = from_arguments(ServiceOptions, arguments)
    if arguments.enclave:
        enclave_mode.check_entrance(arguments)
        enclave_mode.check_gpu(arguments.gpu)
        enclave_mode.check_peer(arguments.gpu, arguments.options)
    if arguments.serve is not None:
        _check_service(arguments)
        return
    if (flag := _service_flag(arguments.service)) is not None:
        raise BadInputError(f"{flag} is for --serve")
    arguments.interactive = arguments.prompt is None and arguments.prompt_file is None and _is_terminal()
    if arguments.interactive and arguments.json:
        raise BadInputError("--json needs a prompt: give --prompt or --prompt-file")
    arguments.text = None if arguments.interactive else _text(arguments)


def _check_service(arguments: argparse.Namespace) -> None:
    """Of --serve."""
    if arguments.prompt is not None or arguments.prompt_file is not None or arguments.chat or arguments.json:
        raise BadInputError(
            "--serve takes its prompts from clients: leave out --prompt, --prompt-file, --chat and --json"
        )
    if arguments.options.stats or arguments.options.trace:
        raise BadInputError("--stats and --trace keep all calls until the end: with --serve use /metrics or --log-rpc")
    for module in SERVICE_MODULES:
        if importlib.util.find_spec(module) is None:
            raise BadInputError(f"--serve needs {module}, which is not installed: pip install 'asynctsqp[serve]'")
    arguments.address = Address.parse(arguments.serve)
    if not arguments.address.loopback:
        if arguments.service.api_keys is None:
            raise BadInputError(f"--serve {arguments.serve} can be reached from elsewhere: give it --api-keys")
        if arguments.service.tls == "off":
            raise BadInputError(f"--serve {arguments.serve} can be reached from elsewhere: leave out --tls off")


def _service_flag(options: ServiceOptions) -> str | None:
    """One that was given, if any was."""
    given = (field.name for field in dataclasses.fields(options) if getattr(options, field.name) != field.default)
    return next(("--" + name.replace("_", "-") for name in given), None)


def _is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _text(arguments: argparse.Namespace) -> str:
    """The prompt; standard input is read here, before an event loop could keep Ctrl-C from ending the wait."""
    try:
        if arguments.prompt is not None:
            text = str(arguments.prompt)
        elif arguments.prompt_file is not None:
            text = Path(arguments.prompt_file).read_text("utf-8")
        else:
            text = "" if sys.stdin is None else sys.stdin.read()
    except (OSError, UnicodeDecodeError) as error:
        source = arguments.prompt_file or "standard input"
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise BadInputError(f"cannot read the prompt from {source}: {reason}") from None
    if not text:
        raise PromptError("the prompt is empty")
    return text


def _run(arguments: argparse.Namespace) -> None:
    os.environ |= openmp()
    keep_freed()
    with _gpu_side(arguments) as arguments.gpu_side:
        with at_once(lambda: _interrupted(arguments.gpu_side)):
            from asynctsqp import command  # takes seconds: after the arguments have been checked

        loop_factory = uvloop.new_event_loop if arguments.serve and arguments.options.loop == "uvloop" else None
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(command.run(arguments))


def _interrupted(gpu_side: LocalGpuSide | None) -> int:
    if gpu_side is not None:
        gpu_side.stop()
    return interrupted("asynctsqp.tee")


@contextlib.contextmanager
def _gpu_side(arguments: argparse.Namespace) -> Iterator[LocalGpuSide | None]:
    """One of our own, if that is what is asked for, on its way up while we import: its seconds beside ours."""
    if arguments.gpu is not None or not os.path.isdir(arguments.model):  # a hub id is downloaded first, by us
        yield None
        return
    started = LocalGpuSide(arguments.model, arguments.options)
    try:
        started.start()
        yield started
    finally:
        started.stop()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # all that matters is closed: no thread of a library may hold up the end
