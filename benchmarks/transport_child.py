"""The other process of benchmarks.transport: sends back what comes, and tells when it came."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch

from asynctsqp.shm import Region
from benchmarks.transport_exchange import Taken, put, take
from benchmarks.transport_ways import Sockets, Way
from benchmarks.worker import serve


class Child:
    """The commands that benchmarks.worker runs by name."""

    def __init__(self) -> None:
        self._sockets = Sockets()
        self._ways: dict[str, Way] = {}

    def connect(self, threads: int, ipc: str, tcp: str) -> dict[str, Any]:
        """threads: of torch, for copies."""
        torch.set_num_threads(threads)
        self._sockets.connect(ipc, tcp)
        return {}

    def attach(self, name: str, slot_bytes: int) -> dict[str, Any]:
        self._ways = self._sockets.ways(Region.attach(name, 1, 1, slot_bytes), parent=False)
        return {}

    def echo(self, name: str, count: int) -> dict[str, Any]:
        """Sends `count` tensors back. taken: of each, when it was received and ready, in ns."""
        way = self._ways[name]
        return {"taken": [dataclasses.astuple(_send_back(way)) for _ in range(count)]}

    def close(self) -> None:
        self._sockets.close()


def _send_back(way: Way) -> Taken:
    taken, tensor = take(way)
    put(way, tensor)
    return taken


def main() -> None:
    # nobody writes into the tensors that are made over messages
    warnings.filterwarnings("ignore", message="The given buffer is not writable")
    child = Child()
    try:
        serve({"connect": child.connect, "attach": child.attach, "echo": child.echo})
    finally:
        child.close()


if __name__ == "__main__":
    main()
