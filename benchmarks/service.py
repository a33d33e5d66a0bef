"""Whether the service stands many clients at once, some of which leave, do not read, or talk nonsense.

    python -m benchmarks.service [--model MODEL] [--clients N] [--seconds N] [--engine KEY=VALUE]... [--out FILE]

`python -m asynctsqp.tee --serve` with a GPU side of its own, and --clients clients (64) that send one request after
another for --seconds (180): whole answers, streams, streams read slowly, clients that leave in the middle of a stream
or before their answer, bodies that are no requests. Every prompt's greedy answer is known beforehand, from a time when
nobody else asked; prompts where the two likeliest tokens are within 0.05 of each other somewhere are left out, since
rounding decides between those. A process of its own asks /health all the time.

- failed: requests with another answer, status or end than the expected one. None may be.
- /health: p50, p99 and the longest, ms. The aim is a p99 below 100.
- memory: resident, of the TEE side's process, sampled each second; the median of the last third against that of the
  second third of the run, since the first fills what is kept. The aim is a growth below 2 %.
- held: requests that the service still counts as running or waiting when all clients are gone. None may be.

Not measured: a network, TLS, a GPU. The clients run on the same cores as both sides.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from asynctsqp.config import OneLineParser
from asynctsqp.errors import BadInputError
from benchmarks import demo_model, machine
from benchmarks.cli import Step, add_engine_flag, ending, engine_options, publish, steps
from benchmarks.harness import WorkerFailed
from benchmarks.rounds import percentile
from benchmarks.service_clients import Clients

HEALTH_AIM_MS = 100.0
GROWTH_AIM = 0.02
PROBE_EVERY_S = 0.02
SAMPLE_EVERY_S = 1.0
LEAST_PROMPTS = 4
SETTLE_S = 2.0
END_S = 60.0
GAUGES = ("asynctsqp_requests_admitted", "asynctsqp_requests_running", "asynctsqp_requests_waiting")


@contextlib.contextmanager
def running(model: str, options: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The service as a process: its URL and its process id. Raises WorkerFailed if it does not come up."""
    command = [sys.executable, "-m", "asynctsqp.tee", "--model", model, "--serve", "127.0.0.1:0"]
    for name, value in options.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline() if process.stdout else ""
        word, _, url = line.strip().partition(" ")
        if word != "serving":
            raise WorkerFailed(f"the service ended with code {process.wait()}")
        yield url, process.pid
        process.terminate()
        if process.wait(END_S):
            raise WorkerFailed(f"the service ended with code {process.returncode}")
    finally:
        process.kill()
        process.wait()


async def run(model: str, options: Mapping[str, Any], clients: int, seconds: float, step: Step) -> dict[str, Any]:
    step("loading")
    with running(model, options) as (url, pid):
        async with httpx.AsyncClient(base_url=url, timeout=END_S) as http:
            name = (await http.get("/v1/models")).json()["data"][0]["id"]
            step("asking alone")
            crowd = Clients(url, name, clients)
            prompts = await crowd.learn()
            if prompts < LEAST_PROMPTS:
                raise WorkerFailed(f"only {prompts} prompts have an answer beyond doubt with this model")
            step(f"{clients} clients")
            before = await _counts(http)
            prober = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "benchmarks.service_prober", url + "/health", str(seconds), str(PROBE_EVERY_S)),
                stdout=asyncio.subprocess.PIPE,
            )
            memory: list[int] = []
            sampling = asyncio.create_task(_sample(psutil.Process(pid), memory))
            await crowd.run(clients, seconds)
            sampling.cancel()
            out, _ = await prober.communicate()
            await crowd.close()
            await asyncio.sleep(SETTLE_S)
            after = await _counts(http)
    tokens = after["asynctsqp_inter_token_seconds_count"] - before["asynctsqp_inter_token_seconds_count"]
    return {
        "prompts": prompts,
        "requests": dict(crowd.done),
        "failed": dict(crowd.failed),
        "held": {gauge: after[gauge] for gauge in GAUGES},
        "tokens_per_s": tokens / seconds,
        "health": _health(json.loads(out)),
        "memory": _memory(memory),
    }


async def _counts(http: httpx.AsyncClient) -> dict[str, float]:
    families = text_string_to_metric_families((await http.get("/metrics")).text)
    return {sample.name: sample.value for family in families for sample in family.samples}


async def _sample(process: psutil.Process, into: list[int]) -> None:
    while True:
        into.append(process.memory_info().rss)
        await asyncio.sleep(SAMPLE_EVERY_S)


def _health(probed: Mapping[str, Any]) -> dict[str, Any]:
    taken = probed["seconds"]
    figures = {f"p{percent}_ms": 1e3 * percentile(taken, percent) for percent in (50, 99)}
    return {"answers": len(taken), "bad": probed["bad"], **figures, "longest_ms": 1e3 * max(taken)}


def _memory(samples: Sequence[int]) -> dict[str, Any]:
    third = max(1, len(samples) // 3)
    second, last = statistics.median(samples[third : 2 * third] or samples), statistics.median(samples[-third:])
    return {"first": samples[0], "second_third": second, "last_third": last, "growth": last / second - 1}


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="benchmarks.service", description="Whether the service stands many clients at once.")
    parser.add_argument("--model", metavar="MODEL", help="a checkpoint (default: the demo model)")
    parser.add_argument("--clients", type=int, default=64, metavar="N", help="at once (default: 64)")
    parser.add_argument("--seconds", type=float, default=180, metavar="N", help="(default: 180)")
    add_engine_flag(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there too")
    return parser


def _report(arguments: argparse.Namespace) -> dict[str, Any]:
    options = engine_options(arguments.engine)
    if arguments.clients < 1 or arguments.seconds < 1:
        raise BadInputError("--clients and --seconds are at least 1")
    model = arguments.model or str(demo_model.prepare())
    settings = {"model": model, "engine": options, "clients": arguments.clients, "seconds": arguments.seconds}
    described = machine.describe()
    with steps(3) as step:
        results = asyncio.run(run(model, options, arguments.clients, arguments.seconds, step))
    aim = {"failed": 0, "held": 0, "health_p99_ms": HEALTH_AIM_MS, "growth": GROWTH_AIM}
    return {"benchmark": "service", "machine": described, "settings": settings, "aim": aim, "results": results}


def _print(report: Mapping[str, Any], out: Path | None) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(machine.summary(report["machine"]), highlight=False, soft_wrap=True)
    console.print(_table(report["settings"], report["results"]))
    for what, count in report["results"]["failed"].items():
        console.print(f"failed {count} times: {what}", highlight=False, markup=False)
    publish(report, out)


def _table(settings: Mapping[str, Any], results: Mapping[str, Any]) -> Table:
    clients, seconds = settings["clients"], settings["seconds"]
    table = Table(title=f"{clients} clients at once for {seconds:.0f} s", title_justify="left")
    for heading, justify in (("what", "left"), ("figure", "right"), ("aim", "right"), ("", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for kind, count in sorted(results["requests"].items()):
        table.add_row(f"requests: {kind}", str(count), "", "")
    health, memory = results["health"], results["memory"]
    failed, held = sum(results["failed"].values()) + health["bad"], max(results["held"].values())
    p99, growth = health["p99_ms"], memory["growth"]
    table.add_row("failed", str(failed), "0", _met(failed == 0))
    table.add_row("held at the end", f"{held:.0f}", "0", _met(held == 0))
    table.add_row("/health p50, ms", f"{health['p50_ms']:.1f}", "", "")
    table.add_row("/health p99, ms", f"{p99:.1f}", f"{HEALTH_AIM_MS:.0f}", _met(p99 < HEALTH_AIM_MS))
    table.add_row("/health longest, ms", f"{health['longest_ms']:.1f}", "", "")
    table.add_row("resident memory, MiB", f"{memory['last_third'] / (1 << 20):.0f}", "", "")
    table.add_row("its growth", f"{growth:+.1%}", f"{GROWTH_AIM:.0%}", _met(growth < GROWTH_AIM))
    table.add_row("tokens/s", f"{results['tokens_per_s']:.1f}", "", "")
    return table


def _met(is_met: bool) -> str:
    return "met" if is_met else "missed"


def main(words: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(words)
    with ending("benchmarks.service", demo_model.DemoModelError) as end:
        _print(_report(arguments), arguments.out)
    return end.code


if __name__ == "__main__":
    sys.exit(main())
