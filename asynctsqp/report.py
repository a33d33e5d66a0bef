"""`python -m asynctsqp.report`: where the time of logged calls went."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from asynctsqp.config import OneLineParser
from asynctsqp.ending import ended
from asynctsqp.errors import BadInputError

SUFFIXES = (".png", ".svg", ".pdf")


def main() -> int:
    return ended("asynctsqp.report", _report, "cannot write the report")


def _report() -> None:
    arguments = _parser().parse_args()
    _check(arguments)
    _run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="asynctsqp.report",
        description="Say where the time of the calls in a log went, and what to try. "
        "`python -m asynctsqp.tee --log-rpc FILE` writes one.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a log of calls")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it too: FILE.png, .svg or .pdf")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    """All that can be known to be wrong before the slow imports."""
    if arguments.plot is not None and arguments.plot.suffix.lower() not in SUFFIXES:
        raise BadInputError(f"--plot writes {', '.join(SUFFIXES)}, not {str(arguments.plot)!r}")


def _run(arguments: argparse.Namespace) -> None:
    from asynctsqp.reports.rpc_log import read_log

    rpcs = read_log(arguments.file, lambda line: print(f"asynctsqp.report: warning: {line}", file=sys.stderr))
    from asynctsqp.reports.rpc_report import report_of  # numpy: after the file has been read

    report = report_of(rpcs)
    if arguments.plot is not None:
        from asynctsqp.reports.rpc_plot import plot

        plot(report, arguments.plot)
    if arguments.json:
        import msgspec

        print(msgspec.json.encode(report).decode())
    else:
        from rich.console import Console

        from asynctsqp.reports.rpc_report_table import show

        console = Console()
        with console.capture() as shown:  # rich would end the process itself when nobody reads
            show(report, console)
        print(shown.get(), end="")


if __name__ == "__main__":
    sys.exit(main())
