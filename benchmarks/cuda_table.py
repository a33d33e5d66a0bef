"""The figures of benchmarks.cuda on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import machine

DIGITS = {"decode": 2, "prefill": 3}
DISTURBED = "* other processes took more than 5 % of the cores' time: measure it again"

Result = Mapping[str, Any]  # of one setting, see benchmarks.cuda


def show(report: Mapping[str, Any], console: Console) -> None:
    console.print(machine.summary(report["machine"]), highlight=False, soft_wrap=True)
    console.print(f"on {report['machine'].get('gpu', report['machine']['cpu'])}", highlight=False, soft_wrap=True)
    tokens = report["settings"]["prompt_tokens"]
    console.print(_measure(report["results"], "decode", "a decode step, ms/token"))
    console.print(_measure(report["results"], "prefill", f"a prefill of {tokens} tokens, s"))
    if any(result[name]["disturbed"] for result in report["results"] for name in DIGITS):
        console.print(DISTURBED, highlight=False)


def _measure(results: list[Result], name: str, title: str) -> Table:
    table = Table("model", "dtype", "partition", "lanes", title=title, title_justify="left")
    for heading in ("asynctsqp", "aim", "transformers", "ratio", "GPU busy", "communication"):
        table.add_column(heading, justify="right")
    for result in results:
        setting = result["model"], result["dtype"], result["partition"], str(result["lanes"] or "chosen")
        table.add_row(*setting, *_cells(name, result[name]))
    return table


def _cells(name: str, figures: Result) -> tuple[str, ...]:
    digits = DIGITS[name]
    ours = f"{figures['ours_median']:.{digits}f}{'*' if figures['disturbed'] else ''}"
    aim = "-" if figures["aim"] is None else f"{figures['aim']:.{digits}f}"
    ratio = "-" if figures["disturbed"] else f"{figures['ratio']:.2f}"
    shares = tuple(f"{100 * figures[share]:.0f} %" for share in ("gpu_share", "communication_share"))
    return ours, aim, f"{figures['theirs_median']:.{digits}f}", ratio, *shares
