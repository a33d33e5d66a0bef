"""A prefill through a throttled link, with and without compression, and where compression stops to pay."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from asynctsqp.compression import NAMES
from asynctsqp.cores import openmp
from benchmarks.compression_codecs import CODECS
from benchmarks.figures import compare
from benchmarks.harness import Worker, WorkerFailed, openmp_free
from benchmarks.plain_transfer import bits_per_s
from benchmarks.worker import die_with_parent

LIMITS: dict[str, float | None] = {"100 Mbit/s": 1e8, "300 Mbit/s": 3e8, "1 Gbit/s": 1e9, "unthrottled": None}
PLAIN_S = 0.5  # of a plain transfer, each way
PLAIN_MOST_BYTES = 256 << 20

Samples = dict[str, dict[str, list[float]]]  # seconds, by limit and compression
Rates = dict[str, dict[str, list[float]]]  # bits/s, by limit and direction


@dataclass(frozen=True)
class Network:
    """A proxy, and its two ways: to the GPU side, and back to ourselves."""

    proxy: Worker
    endpoint: str
    listener: socket.socket
    plain_port: int

    def limit(self, rate: float | None) -> None:
        self.proxy.ask("limit", bits_per_s=rate)

    def plain(self, rate: float | None) -> dict[str, float]:
        """What gets through, measured: bits/s each way."""
        count = PLAIN_MOST_BYTES if rate is None else int(rate * PLAIN_S / 8)
        return bits_per_s(self.listener, self.plain_port, count)


@contextlib.contextmanager
def gpu_side(model: str) -> Iterator[str]:
    """A real one, at the endpoint that is given. Raises WorkerFailed."""
    command = [sys.executable, "-m", "asynctsqp.gpu", "--model", model, "--bind", "tcp://127.0.0.1:0"]
    environment = openmp_free(dict(openmp()))  # the command makes its own settings
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, process_group=0, preexec_fn=die_with_parent
    )
    with process:
        try:
            word, _, endpoint = process.stdout.readline().strip().partition(" ") if process.stdout else ("", "", "")
            if word != "listening":
                raise WorkerFailed("the GPU side does not listen")
            yield endpoint
        finally:
            process.terminate()


@contextlib.contextmanager
def network(gpu_endpoint: str) -> Iterator[Network]:
    with Worker("the proxy", "benchmarks.throttle", {}) as proxy, socket.create_server(("127.0.0.1", 0)) as listener:
        gpu_port = proxy.ask("open", port=int(gpu_endpoint.rpartition(":")[2]))["port"]
        plain_port = proxy.ask("open", port=listener.getsockname()[1])["port"]
        yield Network(proxy, f"tcp://127.0.0.1:{gpu_port}", listener, plain_port)


def measure(
    tee: Worker, net: Network, model: str, dtype: str, tokens: list[int], rounds: int, step: Callable[[str], None]
) -> dict[str, Any]:
    """One dtype: every limit with every compression, in turns. step: called as a round begins."""
    for name in NAMES:
        tee.ask("connect", name=name, model=model, endpoint=net.endpoint, options={"dtype": dtype, "compress": name})
        tee.ask("prefill", name=name, tokens=tokens)  # a first one is slower
    seconds: Samples = {limit: {name: [] for name in NAMES} for limit in LIMITS}
    plain: Rates = {limit: {"there": [], "back": []} for limit in LIMITS}
    for count in range(rounds):
        step(f"{dtype}: round {count + 1} of {rounds} through the proxy")
        _round(tee, net, tokens, seconds, plain)
    net.limit(None)
    tee.ask("disconnect")
    links = [_link(limit, seconds[limit], plain[limit]) for limit in LIMITS]
    return {"links": links, "crossover": {codec: crossover(links, codec) for codec in CODECS}}


def _round(tee: Worker, net: Network, tokens: list[int], seconds: Samples, plain: Rates) -> None:
    for limit, rate in LIMITS.items():
        net.limit(rate)
        for direction, achieved in net.plain(rate).items():
            plain[limit][direction].append(achieved)
        for name in NAMES:
            seconds[limit][name].append(tee.ask("prefill", name=name, tokens=tokens)["first_s"])


def _link(limit: str, seconds: Mapping[str, Sequence[float]], plain: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    return {
        "limit": limit,
        "limit_bits_per_s": LIMITS[limit],
        "plain_bits_per_s": {direction: statistics.median(rates) for direction, rates in plain.items()},
        "prefill_s": {name: statistics.median(samples) for name, samples in seconds.items()},
        "against_none": {name: dataclasses.asdict(compare(seconds[name], seconds["none"])) for name in CODECS},
        "samples_s": seconds,
    }


def crossover(links: Sequence[Mapping[str, Any]], codec: str) -> dict[str, Any]:
    """Where the time saved becomes none, going from slow links to fast ones.

    A prefill's time is linear in the seconds that a bit takes, and so is the difference of two: between two links it
    is interpolated in that. pays: "below" gbit_s, or "always" or "never" on the links that were tried.
    rounds_agree: every round says so, on the two links beside the crossover, or on all; else it may be noise.
    """
    slow_first = sorted(links, key=_seconds_per_bit, reverse=True)
    if _saved_s(slow_first[0], codec) <= 0:
        return {"pays": "never", "gbit_s": None, "rounds_agree": all(_loses(link, codec) for link in links)}
    for slow, fast in pairwise(slow_first):
        gain, loss = _saved_s(slow, codec), _saved_s(fast, codec)
        if loss <= 0:
            share = gain / (gain - loss)
            seconds = (1 - share) * _seconds_per_bit(slow) + share * _seconds_per_bit(fast)
            agree = _gains(slow, codec) and _loses(fast, codec)
            return {"pays": "below", "gbit_s": 1e-9 / seconds, "rounds_agree": agree}
    return {"pays": "always", "gbit_s": None, "rounds_agree": all(_gains(link, codec) for link in links)}


def _seconds_per_bit(link: Mapping[str, Any]) -> float:
    return statistics.mean(1 / rate for rate in link["plain_bits_per_s"].values())


def _saved_s(link: Mapping[str, Any], codec: str) -> float:
    return float(link["prefill_s"]["none"] - link["prefill_s"][codec])


def _gains(link: Mapping[str, Any], codec: str) -> bool:
    return bool(link["against_none"][codec]["interval"]["high"] < 1)


def _loses(link: Mapping[str, Any], codec: str) -> bool:
    return bool(link["against_none"][codec]["interval"]["low"] > 1)
