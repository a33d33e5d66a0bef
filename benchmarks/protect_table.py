"""The figures of benchmarks.protect on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import machine


def show(report: Mapping[str, Any], console: Console) -> None:
    results = report["results"]
    console.print(machine.summary(report["machine"]), highlight=False, soft_wrap=True)
    for name in ("decode", "prefill"):
        console.print(_times(name, results[name]))
    bank = results["bank"]
    console.print(
        f"bank: {bank['ms_per_token']:.2f} ms and {bank['bytes_per_token'] / 1e6:.2f} MB a token "
        f"({bank['tokens']} tokens made)",
        highlight=False,
    )
    for requests, rows in results["sustained"].items():
        console.print(_sustained(requests, rows))


def _times(name: str, result: Mapping[str, Any]) -> Table:
    aim = f"{result['aim']['contender']} at most {result['aim']['of_none']:.1f} of none: {result['verdict']}"
    quiet = f"{result['quiet_rounds']} of {result['rounds']} rounds quiet"
    table = Table("", title=f"{name}, {quiet}; aim: {aim}", title_justify="left")
    for heading in (result["unit"], "of none", "interval", "of int8 inside", "of transformers"):
        table.add_column(heading, justify="right")
    for contender, row in result["contenders"].items():
        interval = f"{row['interval']['low']:.2f} to {row['interval']['high']:.2f}"
        ratios = f"{row['of_none']:.2f}", interval, f"{row['of_int8']:.2f}", f"{row['of_transformers']:.2f}"
        table.add_row(contender, f"{row['median']:.1f}", *ratios)
    return table


def _sustained(requests: str, rows: Mapping[str, Any]) -> Table:
    table = Table("", title=f"sustained from a cold bank, {requests} at once", title_justify="left")
    for heading in ("tokens", "tokens/s", "CPU ms/token", "others' share"):
        table.add_column(heading, justify="right")
    for contender, row in rows.items():
        others = f"{100 * row['others_share']:.0f} %"
        cells = f"{row['tokens']}", f"{row['tokens_per_s']:.1f}", f"{row['cpu_ms_per_token']:.1f}", others
        table.add_row(contender, *cells)
    return table
