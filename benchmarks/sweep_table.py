"""The figures of benchmarks.sweep on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import machine

WORDS = {
    "reached": "reached",
    "cannot be told apart": "reached: the pairs cannot tell",
    "missed": "MISSED",
    "too few pairs": "none: too few pairs",
    "disturbed": "DISTURBED: run it again",
}

Result = Mapping[str, Any]  # of one measure


def show(report: Mapping[str, Any], console: Console) -> None:
    console.print(machine.summary(report["machine"]), highlight=False, soft_wrap=True)
    console.print(_settings(report["results"], report["settings"]))
    console.print(_verdicts(report["results"], report["aim"]))


def _settings(results: Mapping[str, Result], common: Mapping[str, Any]) -> Table:
    """The rounds that chose the best."""
    prompt = f"{common['dtype']}, prefill of {common['prompt_tokens']} tokens"
    quiet = ", ".join(f"{name} {one['quiet_rounds']} of {one['rounds']}" for name, one in results.items())
    table = Table("setting", title=f"all settings ({prompt}); quiet rounds: {quiet}", title_justify="left")
    for name, result in results.items():
        table.add_column(f"{name}, {result['unit']}", justify="right")
        table.add_column("automatic is", justify="right")
        table.add_column("")
    for setting in next(iter(results.values()))["settings"]:
        cells = [cell for result in results.values() for cell in _cells(result, setting)]
        table.add_row(setting, *cells)
    return table


def _cells(result: Result, setting: str) -> tuple[str, str, str]:
    figures = result["settings"][setting]
    chosen = "chosen" if setting == result["best"] else ""
    return f"{figures['median']:.1f}", f"{figures['ratio']:.2f} times", chosen


def _verdicts(results: Mapping[str, Result], aim: float) -> Table:
    """The pairs, which are all new."""
    table = Table("new pairs", "chosen", title="automatic against the chosen", title_justify="left")
    for heading in ("automatic", "chosen's", "ratio", "interval of the ratio", "quiet pairs"):
        table.add_column(heading, justify="right")
    table.add_column(f"aim, at most {aim}")
    for name, result in results.items():
        table.add_row(f"{name}, {result['unit']}", result["best"], *_comparison(result["comparison"]))
    return table


def _comparison(figures: Mapping[str, Any]) -> tuple[str, ...]:
    interval = figures["interval"]
    span = f"{interval['low']:.2f} to {interval['high']:.2f} ({100 * interval['confidence']:.0f} %)"
    quiet = f"{sum(sample['quiet'] for sample in figures['samples'])} of {len(figures['samples'])}"
    medians = f"{figures['ours_median']:.1f}", f"{figures['theirs_median']:.1f}"
    return *medians, f"{figures['ratio']:.2f}", span, quiet, WORDS[figures["verdict"]]
