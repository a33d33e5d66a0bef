"""The report on a log of calls, on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from asynctsqp.reports.phases import PHASES
from asynctsqp.reports.rpc_report import Method, RpcReport

SHOWN = (*PHASES[:3], "gpu", "on the way", *PHASES[3:])  # wait, and the two parts of it


def show(report: RpcReport, console: Console) -> None:
    """Prints the methods, the phases of each, the bottleneck and the advice."""
    transports = ", ".join(f"{name} ({calls})" for name, calls in report.transports.items())
    line = f"{report.calls} calls, {report.calls_s:.3f} s added up, in {report.wall_s:.3f} s; by {transports}"
    console.print(Text(line), soft_wrap=True)
    console.print(_methods(report))
    console.print(_phases(report))
    worst = report.bottleneck
    line = (
        f"Bottleneck: {worst.phase}, {100 * worst.phase_share:.1f} % of the calls' time; of the methods "
        f"{worst.method}, {100 * worst.method_share:.1f} %."
    )
    for sentence in (line, *report.advice):
        console.print(Text(sentence), soft_wrap=True)


def _methods(report: RpcReport) -> Table:
    table = Table("method", title="Calls", title_justify="left")
    for heading in ("calls", "MB sent", "MB received", "MB/s", "total, ms", "share"):
        table.add_column(heading, justify="right")
    for method in report.methods:
        table.add_row(Text(method.name), *_traffic(method))
    return table


def _traffic(method: Method) -> tuple[str, ...]:
    sizes = f"{method.bytes_sent / 1e6:.2f}", f"{method.bytes_received / 1e6:.2f}"
    time = f"{1e3 * method.total_s:.2f}", f"{100 * method.share:.2f} %"
    return str(method.calls), *sizes, f"{method.mb_per_s:.1f}", *time


def _phases(report: RpcReport) -> Table:
    table = Table("method", "phase", title="Phases, in microseconds", title_justify="left")
    for heading in ("average", "p50", "p99"):
        table.add_column(heading, justify="right")
    for method in report.methods:
        for index, name in enumerate(SHOWN):
            phase = method.phases[name]
            figures = (f"{1e6 * seconds:.1f}" for seconds in (phase.average_s, phase.p50_s, phase.p99_s))
            table.add_row(Text("" if index else method.name), name, *figures)
        table.add_section()
    return table
