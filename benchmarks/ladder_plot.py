"""Prefill and decode of every rung, as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BARS = {"float32": "lightsteelblue", "bfloat16": "bisque"}  # colours, by dtype
LINES = {"float32": "tab:blue", "bfloat16": "tab:orange"}


def draw(report: Mapping[str, Any], file: Path) -> None:
    """A bar a rung, and transformers as a line. file: its ending chooses the format."""
    results = report["results"]
    figure = Figure(figsize=(11, 1.5 + 0.35 * len(results)), layout="constrained")
    FigureCanvasAgg(figure)
    prefill, decode = figure.subplots(1, 2, sharey=True)
    _bars(prefill, results, "prefill", f"prefill of {report['settings']['prompt_tokens']} tokens, s")
    _bars(decode, results, "decode", "decode, ms/token")
    prefill.invert_yaxis()  # the first rung is the uppermost; both share the axis
    figure.savefig(file)


def _bars(axes: Axes, results: Mapping[str, Any], name: str, label: str) -> None:
    values = [result[name]["ours_median"] for result in results.values()]
    colours = [BARS[result["dtype"]] for result in results.values()]
    axes.bar_label(axes.barh(list(results), values, color=colours), fmt="%.3g", padding=3)
    for dtype in dict.fromkeys(result["dtype"] for result in results.values()):
        theirs = [result[name]["theirs_median"] for result in results.values() if result["dtype"] == dtype]
        line = statistics.median(theirs)
        axes.axvline(line, color=LINES[dtype], linestyle="--", label=f"transformers, {dtype}")
    axes.set_xlabel(label)
    axes.margins(x=0.15)
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
