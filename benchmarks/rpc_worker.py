"""The asking end of every way of benchmarks.rpc, and the processes at the other ends."""

from __future__ import annotations

import contextlib
import os
from functools import partial
from typing import Any

import uvloop
import zmq
import zmq.asyncio

from benchmarks.harness import Worker
from benchmarks.rpc_bare import WORDS_BYTES, Ask, Words, ask_spin, ask_spin_loop, ask_zmq
from benchmarks.rpc_product import Product, messages
from benchmarks.worker import serve

PRODUCT = {"doorbell": "on", "messages": "off"}  # the option by way
WARM_UP = 200  # round trips before those that count: both ends get there at their own time


class Trips:
    """The commands that benchmarks.worker runs by name."""

    def __init__(self, loop: uvloop.Loop, resources: contextlib.ExitStack) -> None:
        self._loop = loop
        self._resources = resources
        self._ways: dict[str, Ask] = {}
        self._gpu: Worker | None = None
        self._peer: Worker | None = None

    def load(self, model: str) -> dict[str, Any]:
        """bytes: of a call and of its answer."""
        self._gpu = self._resources.enter_context(Worker("the idle GPU side", "benchmarks.timed_gpu", {}))
        self._peer = self._resources.enter_context(Worker("the peer", "benchmarks.rpc_peer", {}))
        endpoint = self._gpu.ask("serve", model=model, timed=False)["endpoint"]
        for way, doorbell in PRODUCT.items():
            product = self._loop.run_until_complete(Product.open(model, endpoint, doorbell))
            self._resources.callback(lambda each: self._loop.run_until_complete(each.close()), product)
            self._ways[way] = product.round_trips
        request, reply = messages()
        self._open_bare(self._peer, request, reply)
        return {"bytes": [len(request), len(reply)]}

    def trips(self, way: str, count: int) -> dict[str, Any]:
        """ns: of each round trip. calls: that the GPU side has answered, of this way and of those before it."""
        if self._gpu is None or self._peer is None:
            raise RuntimeError("nothing is loaded")
        if way not in PRODUCT:
            self._peer.send("answer", way=way, count=WARM_UP + count)
        taken = self._loop.run_until_complete(self._ways[way](WARM_UP + count))
        if way not in PRODUCT:
            self._peer.receive()
        return {"ns": taken[WARM_UP:], "calls": self._gpu.ask("counts")["calls"]}

    def _open_bare(self, peer: Worker, request: bytes, reply: bytes) -> None:
        file = os.memfd_create("asynctsqp-words")
        os.truncate(file, WORDS_BYTES)
        endpoint = peer.ask("open", words=f"/proc/{os.getpid()}/fd/{file}", reply=reply.hex())["endpoint"]
        words = Words(file)
        self._resources.callback(words.close)
        context = self._resources.enter_context(zmq.asyncio.Context())
        socket = self._resources.enter_context(context.socket(zmq.DEALER))
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(endpoint)
        self._ways["zmq"] = partial(ask_zmq, socket, request)
        self._ways["spin"] = partial(ask_spin, words.words)
        self._ways["spin-loop"] = partial(ask_spin_loop, words.words)


def main() -> None:
    loop = uvloop.new_event_loop()
    with contextlib.closing(loop), contextlib.ExitStack() as resources:
        trips = Trips(loop, resources)
        serve({"load": trips.load, "trips": trips.trips})


if __name__ == "__main__":
    main()
