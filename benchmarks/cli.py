"""What the command lines of benchmarks share: options for the engine, and progress on standard error."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from asynctsqp.config import EngineOptions, make
from asynctsqp.errors import AsynctsqpError, BadInputError
from benchmarks.harness import WorkerFailed

Step = Callable[[str], None]  # what is called as a step begins, with its name


def add_engine_flag(parser: argparse.ArgumentParser) -> None:
    """--engine, for `engine_options`."""
    parser.add_argument(
        "--engine", action="append", default=[], metavar="KEY=VALUE", help="an Engine option; may be given again"
    )


def engine_options(pairs: Sequence[str]) -> dict[str, Any]:
    """'lanes=1' -> Engine's keyword and value. Raises BadInputError."""
    kinds = {field.name: field.metadata.get("type", str) for field in dataclasses.fields(EngineOptions)}
    options: dict[str, Any] = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        try:
            options[name] = kinds.get(name, str)(text)
        except ValueError:
            raise BadInputError(f"--engine {pair}: {text!r} is no value for {name}") from None
    make(EngineOptions, options)  # refuses what there is not
    return options


@dataclasses.dataclass
class End:
    """How a benchmark ends."""

    code: int = 0


@contextlib.contextmanager
def ending(program: str, *errors: type[Exception]) -> Iterator[End]:
    """What fails inside is one line on standard error, and a code. errors: that may happen beyond the usual ones."""
    end = End()
    try:
        yield end
    except (AsynctsqpError, WorkerFailed, OSError, *errors) as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        end.code = error.exit_code if isinstance(error, AsynctsqpError) else 1
    except KeyboardInterrupt:
        end.code = 130


def publish(report: Mapping[str, Any], out: Path | None) -> None:
    """A result as one line of JSON, on standard output, and in a file if one is named: last, since that may fail."""
    line = json.dumps(report)
    print(line, flush=True)
    if out is not None:
        out.write_text(line + "\n")


@contextlib.contextmanager
def steps(total: int, lines: bool = False) -> Iterator[Step]:
    """A live bar, gone when the block ends. Where standard error is no terminal: nothing, or a line a step.

    lines: for what takes so long that a log has to show how far it is.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    if lines and not console.is_terminal:
        numbers = itertools.count(1)
        yield lambda text: console.print(f"{next(numbers)}/{total} {text}", soft_wrap=True, highlight=False)
        return
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total, completed=-1)
        yield lambda text: progress.update(task, advance=1, description=text)
