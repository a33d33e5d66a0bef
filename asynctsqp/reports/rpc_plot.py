"""The report on a log of calls as a picture."""

from __future__ import annotations

from pathlib import Path

from asynctsqp.errors import BadInputError
from asynctsqp.reports.output_file import cannot_write, open_output
from asynctsqp.reports.rpc_report import PARTS, RpcReport


def plot(report: RpcReport, file: Path) -> None:
    """Stacked bars: the total time of each method by the parts of its calls.

    Raises BadInputError where matplotlib is missing or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure  # draws with Agg into a file: no display is asked for
    except ImportError:
        raise BadInputError("--plot needs matplotlib: pip install 'asynctsqp[plot]'") from None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    # A dollar sign would begin a formula: the names come out of a file.
    names = [f"{method.name} ({method.calls})".replace("$", r"\$") for method in report.methods]
    places = range(len(names))
    below = [0.0] * len(names)
    for part in PARTS:
        heights = [1e3 * method.phases[part].total_s for method in report.methods]
        axes.bar(places, heights, bottom=below, label=part)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.set_xticks(places, names)
    axes.set_ylabel("time of all calls, ms")
    axes.set_xlabel("method (calls)")
    axes.legend(title="part of the call")
    try:
        with open_output(file, "the plot") as out:
            figure.savefig(out, format=file.suffix.lower().lstrip("."))
    except OSError as error:
        raise cannot_write(file, "the plot", error) from None
