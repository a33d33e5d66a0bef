"""A tensor there and back, with the times of both processes, which read one clock: CLOCK_MONOTONIC is the machine's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from asynctsqp.cores import openmp
from asynctsqp.shm import Region
from benchmarks.harness import Worker, WorkerFailed
from benchmarks.transport_ways import COLUMNS, ROW_BYTES, Sockets, Way

STEPS = ("serialise", "send", "receive", "deserialise", "total")


@dataclass(frozen=True)
class Put:
    """When the sender began, had serialised, and had sent: ns."""

    began: int
    serialised: int
    sent: int


@dataclass(frozen=True)
class Taken:
    """When the receiver had the message, and a tensor: ns."""

    received: int
    ready: int


def put(way: Way, tensor: torch.Tensor) -> Put:
    """Sends one tensor."""
    began = time.monotonic_ns()
    frames = way.serialise(tensor)
    serialised = time.monotonic_ns()
    way.send(frames)
    return Put(began, serialised, time.monotonic_ns())


def take(way: Way) -> tuple[Taken, torch.Tensor]:
    """Waits for one tensor."""
    frames = way.receive()
    received = time.monotonic_ns()
    tensor = way.deserialise(frames)
    return Taken(received, time.monotonic_ns()), tensor


def steps(there: Put, taken: Taken) -> dict[str, float]:
    """The STEPS of one way, in ms; the last is the sum of the others.

    A message may be there before its sender returns from sending, whose core the receiver was given: then sending
    has ended with that, and receiving takes 0.
    """
    sent = min(there.sent, taken.received)
    spans = (
        there.serialised - there.began,
        sent - there.serialised,
        taken.received - sent,
        taken.ready - taken.received,
        taken.ready - there.began,
    )
    return {name: span / 1e6 for name, span in zip(STEPS, spans, strict=True)}


class Echo:
    """The parent's end of every way, and the child process at the other one."""

    def __init__(self, worker: Worker, ways: dict[str, Way]) -> None:
        self._worker = worker
        self._ways = ways

    def samples(self, name: str, size: int, count: int) -> list[dict[str, float]]:
        """`count` exchanges of `size` bytes, in ms: the STEPS of the way there, and `round_trip`.

        One more goes before them, which is not counted: what it brings back is checked. Raises WorkerFailed.
        """
        way = self._ways[name]
        tensor = torch.randn(size // ROW_BYTES, COLUMNS)
        self._worker.send("echo", name=name, count=count + 1)
        if not torch.equal(_there_and_back(way, tensor)[2], tensor):
            raise WorkerFailed(f"{name} brought back another tensor than was sent")
        ours = [_there_and_back(way, tensor)[:2] for _ in range(count)]
        theirs = [Taken(*times) for times in self._worker.receive()["taken"][1:]]
        return [
            steps(there, taken) | {"round_trip": (back.ready - there.began) / 1e6}
            for (there, back), taken in zip(ours, theirs, strict=True)
        ]


def _there_and_back(way: Way, tensor: torch.Tensor) -> tuple[Put, Taken, torch.Tensor]:
    there = put(way, tensor)
    back, returned = take(way)
    return there, back, returned


@contextmanager
def echo(largest: int, threads: int) -> Iterator[Echo]:
    """Starts the child and connects every way. largest: bytes of a tensor. Raises SharedMemoryError, WorkerFailed."""
    sockets = Sockets()
    try:
        with Worker("the echo", "benchmarks.transport_child", openmp()) as worker:
            worker.ask("connect", threads=threads, **sockets.bind())
            region = Region.create(None, 1, 1, slot_bytes(largest))
            try:
                _share(worker, region)
                yield Echo(worker, sockets.ways(region, parent=True))
            finally:
                region.close()
    finally:
        sockets.close()


def _share(worker: Worker, region: Region) -> dict[str, Any]:
    """The name lives for just that long."""
    try:
        return worker.ask("attach", name=region.name, slot_bytes=region.slot_bytes)
    finally:
        region.unlink()


def slot_bytes(largest: int) -> int:
    """Whole pages."""
    return -(-largest // 4096) * 4096
