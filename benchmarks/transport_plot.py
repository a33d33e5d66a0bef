"""Total time against size, log-log, as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.transport_verdicts import SEED_BYTES, SEED_MS


def draw(results: Mapping[str, Any], file: Path) -> None:
    """One line a way, the floor, and the predecessor's figure. file: its ending chooses the format."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rows = results["sizes"]
    sizes = [row["bytes"] for row in rows]
    for name in rows[0]["ways"]:
        axes.plot(sizes, [row["ways"][name]["total_ms"] for row in rows], marker="o", markersize=3, label=name)
    floor = [count / results["memcpy_bytes_per_s"] * 1e3 for count in sizes]
    axes.plot(sizes, floor, color="grey", linestyle=":", label="one memcpy")
    axes.plot([SEED_BYTES], [SEED_MS["total"]], "kx", label="the predecessor, on its own machine")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tensor, bytes")
    axes.set_ylabel("one way, ms (median)")
    axes.grid(which="major", alpha=0.3)
    axes.legend()
    figure.savefig(file)
