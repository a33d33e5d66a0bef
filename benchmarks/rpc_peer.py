"""The answering end of the bare ways of benchmarks.rpc."""

from __future__ import annotations

import os
import secrets
from functools import partial
from typing import Any

import uvloop
import zmq
import zmq.asyncio

from benchmarks.rpc_bare import Answer, Words, answer_spin, answer_spin_loop, answer_zmq
from benchmarks.worker import serve


class Peer:
    """The commands that benchmarks.worker runs by name."""

    def __init__(self, loop: uvloop.Loop) -> None:
        self._loop = loop
        self._context = zmq.asyncio.Context()
        self._words: Words | None = None
        self._ways: dict[str, Answer] = {}

    def open(self, words: str, reply: str) -> dict[str, Any]:
        """words: the path of the shared memory; reply: in hexadecimal digits. endpoint: an abstract one (Linux)."""
        self._words = Words(os.open(words, os.O_RDWR))
        socket = self._context.socket(zmq.ROUTER)
        endpoint = f"ipc://@asynctsqp-{secrets.token_hex(8)}"
        socket.bind(endpoint)
        self._ways = {
            "zmq": partial(answer_zmq, socket, bytes.fromhex(reply)),
            "spin": partial(answer_spin, self._words.words),
            "spin-loop": partial(answer_spin_loop, self._words.words),
        }
        return {"endpoint": endpoint}

    def answer(self, way: str, count: int) -> dict[str, Any]:
        self._loop.run_until_complete(self._ways[way](count))
        return {}

    def close(self) -> None:
        self._ways.clear()
        if self._words is not None:
            self._words.close()
        self._context.destroy(linger=0)


def main() -> None:
    loop = uvloop.new_event_loop()
    peer = Peer(loop)
    try:
        serve({"open": peer.open, "answer": peer.answer})
    finally:
        peer.close()
        loop.close()


if __name__ == "__main__":
    main()
