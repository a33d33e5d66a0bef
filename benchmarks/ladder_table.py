"""The figures of benchmarks.ladder: on a terminal, and as the README has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import machine

MB = 1e6
DIGITS = {"prefill": 2, "decode": 1}
DISTURBED = "* other processes took more than 5 % of the cores' time: measure it again"

Result = Mapping[str, Any]  # of one rung, see benchmarks.ladder
Report = Mapping[str, Any]


def show(report: Report, console: Console) -> None:
    console.print(machine.summary(report["machine"]), highlight=False, soft_wrap=True)
    tokens = report["settings"]["prompt_tokens"]
    console.print(_measure(report, "prefill", f"a prefill of {tokens} tokens", "s"))
    console.print(_measure(report, "decode", "a decode step", "ms/token"))
    if any(result[name]["disturbed"] for result in report["results"].values() for name in DIGITS):
        console.print(DISTURBED, highlight=False)
    if "seed" in report["results"]:
        console.print(_road_map(report))


def _measure(report: Report, name: str, title: str, unit: str) -> Table:
    table = Table("rung", "from", "what changes", title=title, title_justify="left")
    for heading in ("RPCs", "MB", "communication", unit, "speed-up", "transformers", "ratio", "its tokens"):
        table.add_column(heading, justify="right")
    for rung, result in report["results"].items():
        if name == "prefill" and rung == report["predecessor"]["prefill"]["rung"]:
            table.add_row(*_predecessor(report["predecessor"]["prefill"]), style="dim")
        figures = result[name]
        theirs = f"{figures['theirs_median']:.{DIGITS[name]}f}"
        ratio = "-" if figures["disturbed"] else f"{figures['ratio']:.2f}"
        same = "the same" if result["same_tokens"] else "others"
        change = result["origin"] or "", result["change"]
        table.add_row(rung, *change, *_cells(name, figures), theirs, ratio, same)
    return table


def _predecessor(known: Result) -> tuple[str, ...]:
    figures = str(known["calls"]), f"{known['bytes'] / MB:.0f}", f"{100 * known['communication_share']:.0f} %"
    return "", "", f"the predecessor itself, {known['tokens']} tokens", *figures, f"{known['seconds']:.1f}"


def _cells(name: str, figures: Result) -> tuple[str, ...]:
    """RPCs, MB, communication, time, speed-up."""
    share = f"{100 * figures['communication_share']:.0f} %"
    return f"{figures['calls']:.0f}", _megabytes(figures), share, _time(name, figures), f"{figures['speed_up']:.2f}"


def _time(name: str, figures: Result) -> str:
    return f"{figures['ours_median']:.{DIGITS[name]}f}{'*' if figures['disturbed'] else ''}"


def _megabytes(figures: Result) -> str:
    size = (figures["bytes_sent"] + figures["bytes_received"]) / MB
    return f"{size:.0f}" if size >= 100 else f"{size:.2f}"


def _road_map(report: Report) -> Table:
    """Its model has 16 layers and ours may not: what can be compared is how far each stage is from the first."""
    table = Table("stage", "rung", title="the predecessor's road map, decode, ms/token", title_justify="left")
    for heading in ("promised", "of the first", "measured", "of the first"):
        table.add_column(heading, justify="right")
    stages = report["predecessor"]["road_map"]
    results = report["results"]
    promised, measured = stages[0][1], results[stages[0][2]]["decode"]["ours_median"]
    for stage, claim, rung in stages:
        ours = ("-", "-")
        if rung in results:
            figures = results[rung]["decode"]
            ours = _time("decode", figures), f"{figures['ours_median'] / measured:.2f}"
        table.add_row(stage, rung or "-", str(claim), f"{claim / promised:.2f}", *ours)
    return table


def markdown(report: Report) -> str:
    """The README's table. Where a cell has two figures they are a prefill's and a decode step's."""
    tokens = report["settings"]["prompt_tokens"]
    headings = ["rung", "partition", "transport", "dtype", "RPCs", "MB", f"{tokens}-token prefill, s"]
    headings += ["decode, ms/token", "communication", "speed-up"]
    rows = [headings, ["---"] * 4 + ["---:"] * (len(headings) - 4)]
    rows += [_markdown_cells(rung, result) for rung, result in report["results"].items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _markdown_cells(rung: str, result: Result) -> list[str]:
    prefill, decode = (_cells(name, result[name]) for name in DIGITS)
    bell = " + doorbell" if result["doorbell"] == "on" else ""
    calls = dict.fromkeys((prefill[0], decode[0]))
    megabytes, share, speed_up = (f"{prefill[index]} / {decode[index]}" for index in (1, 2, 4))
    kinds = [rung, result["partition"], result["transport"] + bell, result["dtype"]]
    return [*kinds, " / ".join(calls), megabytes, prefill[3], decode[3], share, speed_up]
