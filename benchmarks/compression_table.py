"""The figures of benchmarks.compression on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from asynctsqp.compression import NAMES
from benchmarks import machine
from benchmarks.compression_codecs import CODECS


def show(report: Mapping[str, Any], console: Console) -> None:
    settings, results = report["settings"], report["results"]
    console.print(machine.summary(report["machine"]), highlight=False, soft_wrap=True)
    for dtype, rows in results["activations"].items():
        console.print(_activations(f"{dtype}: the tensors of {settings['tokens']} tokens", rows))
    for dtype, result in results["links"].items():
        megabytes = result["computed"]["bytes"] / 1e6
        title = f"{dtype}: a prefill of {settings['link_tokens']} tokens, {megabytes:.0f} MB both ways, s"
        console.print(_links(title, result["links"]))
        for codec in CODECS:
            console.print(_verdict(f"{dtype}, {codec}", codec, result), highlight=False, soft_wrap=True)


def _activations(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table("operation", "direction", title=title, title_justify="left")
    table.add_column("MB", justify="right")
    table.add_column("MB\neach", justify="right")
    for codec in CODECS:
        for heading in (f"{codec}\nratio", "pack\nMB/s", "unpack\nMB/s", "pays below\nGbit/s"):
            table.add_column(heading, justify="right")
    for row in rows:
        sizes = (f"{row['bytes'] / 1e6:.1f}", f"{row['payload_bytes'] / 1e6:.2f}")
        figures = (text for codec in CODECS for text in _figures(row["codecs"][codec]))
        table.add_row(row["op"], row["direction"], *sizes, *figures)
    return table


def _figures(found: Mapping[str, Any]) -> tuple[str, ...]:
    speeds = (_number(found[key], 0) for key in ("pack_mb_s", "unpack_mb_s"))
    return (f"{found['ratio']:.3f}", *speeds, _number(found["breakeven_gbit_s"], 2))


def _links(title: str, links: list[dict[str, Any]]) -> Table:
    table = Table("link", title=title, title_justify="left")
    for heading in ("plain transfer\nthere, back, Mbit/s", *NAMES, *(f"{codec}/none (rounds)" for codec in CODECS)):
        table.add_column(heading, justify="right")
    for link in links:
        plain = ", ".join(f"{rate / 1e6:.0f}" for rate in link["plain_bits_per_s"].values())
        times = (f"{link['prefill_s'][name]:.2f}" for name in NAMES)
        table.add_row(link["limit"], plain, *times, *(_ratio(link["against_none"][codec]) for codec in CODECS))
    return table


def _verdict(name: str, codec: str, result: Mapping[str, Any]) -> str:
    computed, measured = result["computed"]["codecs"][codec], result["crossover"][codec]
    pays = f"below {measured['gbit_s']:.2f} Gbit/s" if measured["pays"] == "below" else measured["pays"]
    bound = computed["breakeven_gbit_s"]
    expected = "never" if bound is None else f"below {bound:.2f} Gbit/s"
    doubt = "" if measured["rounds_agree"] else " (but the rounds disagree)"
    return f"{name}, ratio {computed['ratio']:.3f}: pays {expected} as computed, {pays} as measured{doubt}"


def _ratio(comparison: Mapping[str, Any]) -> str:
    interval = comparison["interval"]
    return f"{comparison['ratio']:.3f} ({interval['low']:.3f} to {interval['high']:.3f})"


def _number(value: float | None, places: int) -> str:
    return "-" if value is None else f"{value:.{places}f}"
