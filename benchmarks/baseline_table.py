"""The figures of benchmarks.baseline on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import machine

MIB = 1 << 20
TRAFFIC = (
    ("RPC calls", "calls", "{:.0f}", 1),
    ("MiB sent", "bytes_sent", "{:.2f}", 1 / MIB),
    ("MiB received", "bytes_received", "{:.2f}", 1 / MIB),
    ("waiting for the GPU side", "wait_share", "{:.0f} %", 100),
)

Results = Mapping[str, Mapping[str, Any]]  # of one report, by dtype


def show(report: Mapping[str, Any], titles: Mapping[str, str], console: Console) -> None:
    """titles: of each measure, by name."""
    console.print(machine.summary(report["machine"]), highlight=False, soft_wrap=True)
    console.print(_times(report["results"], titles, report["settings"]["engine"]))
    console.print(_costs(report["results"]))


def _times(results: Results, titles: Mapping[str, str], engine: Mapping[str, Any]) -> Table:
    """engine: the options that are not automatic."""
    options = f" ({', '.join(f'{name}={value}' for name, value in engine.items())})" if engine else ""
    title = f"this project{options} against transformers"
    table = Table("dtype", "medians of", title=title, title_justify="left")
    for heading in ("asynctsqp", "transformers", "ratio", "interval of the ratio", "quiet pairs"):
        table.add_column(heading, justify="right")
    for dtype, result in results.items():
        for name, title in titles.items():
            table.add_row(dtype, title, *_row(result["times"][name]))
    return table


def _row(times: Mapping[str, Any]) -> tuple[str, ...]:
    medians = f"{times['ours_median']:.1f}", f"{times['theirs_median']:.1f}"
    quiet = f"{sum(sample['quiet'] for sample in times['samples'])} of {len(times['samples'])}"
    if times["disturbed"]:
        return *medians, "-", "DISTURBED: run it again", quiet
    interval = times["interval"]
    span = f"{interval['low']:.2f} to {interval['high']:.2f} ({100 * interval['confidence']:.0f} %)"
    return *medians, f"{times['ratio']:.2f}", span, quiet


def _costs(results: Results) -> Table:
    table = Table("what it takes", title_justify="left")
    for dtype in results:
        table.add_column(dtype, justify="right")
    columns = [dict(_cost_cells(result)) for result in results.values()]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    return table


def _cost_cells(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for process, sizes in result["memory"].items():
        yield f"peak memory of {process}, MiB", f"{sizes['peak'] / MIB:.0f}"
    for name, traffic in result["traffic"].items():
        for title, key, shown, scale in TRAFFIC:
            yield f"{name}: {title}", shown.format(traffic[key] * scale)
