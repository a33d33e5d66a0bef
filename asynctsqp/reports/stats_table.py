"""The timing statistics on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from asynctsqp.reports.stats import Row, Stats

MIB = 1 << 20
WIDTH = 100  # of a report that goes to no terminal


def rendered(stats: Stats) -> str:
    """What `show` prints, as wide as the terminal or as a report in a file is."""
    console = Console(width=None if sys.stderr.isatty() else WIDTH, stderr=True)
    with console.capture() as capture:
        show(stats, console)
    return capture.get().rstrip()


def show(stats: Stats, console: Console) -> None:
    """Prints the sections, what overlapped, and the advice."""
    moved = f"{stats.bytes_sent / MIB:.1f} MiB sent, {stats.bytes_received / MIB:.1f} MiB received"
    console.print(_operations(f"Communication: {moved}", stats.communication))
    console.print(_operations("GPU operations, as the GPU side measured them", stats.gpu))
    console.print(_operations("TEE operations", stats.tee))
    console.print(_totals(stats))
    for line in (*_overlaps(stats), *stats.advice):
        console.print(Text(line), soft_wrap=True)


def _operations(title: str, rows: Iterable[Row]) -> Table:
    table = _table(title, "count", "total, ms", "average, ms", "share")
    for row in rows:
        table.add_row(
            Text(row.name), str(row.count), _ms(row.total_s), f"{1e3 * row.average_s:.3f}", _percent(row.share)
        )
    return table


def _totals(stats: Stats) -> Table:
    table = _table("Totals", "total, ms", "share")
    for total in stats.totals:
        table.add_row(total.name, _ms(total.total_s), _percent(total.share))
    table.add_section()
    table.add_row("wall time", _ms(stats.wall_s), _percent(sum(total.share for total in stats.totals)))
    return table


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _overlaps(stats: Stats) -> Iterable[str]:
    overlap = stats.overlap
    yield (
        f"GPU side busy for {_ms(overlap.gpu_busy_s)} ms, {_ms(overlap.gpu_hidden_s)} ms of it while the TEE side "
        f"was at work; calls took {_ms(overlap.rpc_total_s)} ms one by one, {_ms(overlap.rpc_busy_s)} ms together."
    )
    if stats.clock.error_s is not None:
        yield f"The GPU side's clock is known to within {1e6 * stats.clock.error_s:.1f} us."


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
