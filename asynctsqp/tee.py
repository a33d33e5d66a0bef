"""`python -m asynctsqp.tee`: the TEE side as a process."""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import signal
import sys
from pathlib import Path

from asynctsqp.config import (
    MODEL_HELP,
    EngineOptions,
    OneLineParser,
    SamplingOptions,
    add_arguments,
    from_arguments,
)
from asynctsqp.cores import openmp
from asynctsqp.endpoints import check_endpoint
from asynctsqp.errors import AsynctsqpError, BadInputError, NotBuiltError, PromptError
from asynctsqp.standard_output import drop_output

INTERRUPTED = 130


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends us in order, as Ctrl-C does
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")  # whatever the locale: an answer may hold any character
        arguments = _parser().parse_args()
        _check(arguments)
        _run(arguments)
    except AsynctsqpError as error:
        print(f"asynctsqp.tee: error: {error}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("asynctsqp.tee: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read standard output has gone, as `| head` does
        drop_output()
    except OSError as error:
        drop_output()
        print(f"asynctsqp.tee: error: cannot write the answer: {error.strerror}", file=sys.stderr)
        return BadInputError.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="asynctsqp.tee", description="Answer a prompt with the heavy products elsewhere.")
    parser.add_argument("--model", required=True, metavar="MODEL", help=MODEL_HELP)
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


def _check(arguments: argparse.Namespace) -> None:
    """All that can be known to be wrong before anything is loaded."""
    arguments.options = from_arguments(EngineOptions, arguments)
    arguments.sampling = from_arguments(SamplingOptions, arguments)
    if arguments.gpu is not None:
        check_endpoint("--gpu", arguments.gpu)
    if arguments.serve is not None:
        raise NotBuiltError("--serve is not built yet")
    arguments.interactive = arguments.prompt is None and arguments.prompt_file is None and _is_terminal()
    if arguments.interactive and arguments.json:
        raise BadInputError("--json needs a prompt: give --prompt or --prompt-file")
    arguments.text = None if arguments.interactive else _text(arguments)


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
        raise BadInputError(f"cannot read the prompt from {source}: {error}") from None
    if not text:
        raise PromptError("the prompt is empty")
    return text


def _run(arguments: argparse.Namespace) -> None:
    os.environ |= openmp()
    from asynctsqp import command  # takes seconds: after the arguments have been checked

    asyncio.run(command.run(arguments))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a thread may still wait for a line of standard input
