"""The least that a round trip between two processes takes: what benchmarks.rpc compares the project's calls with.

Three ways, each with an asking and an answering end; both ends of a way are told how many round trips there will be.

- zmq: zmq.asyncio, DEALER to ROUTER, one message each way.
- spin: two words in shared memory, one a direction, that the other end reads until they change. No event loop.
- spin-loop: the same, with a turn of the event loop (asyncio.sleep(0)) after each look that has found nothing.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import time
from collections.abc import Awaitable, Callable

import zmq
import zmq.asyncio

ASKED, ANSWERED = 0, 8  # in 8-byte words: a cache line each
WORDS_BYTES = mmap.PAGESIZE

Ask = Callable[[int], Awaitable[list[int]]]  # how many -> ns that each took
Answer = Callable[[int], Awaitable[None]]


class Words:
    """Shared memory without a name: the other process opens it through this one's table of files."""

    def __init__(self, file: int) -> None:
        """file: open, and closed here."""
        with os.fdopen(file, "r+b") as opened:
            self.memory = mmap.mmap(opened.fileno(), WORDS_BYTES)
        self.words = memoryview(self.memory).cast("Q")

    def close(self) -> None:
        self.words.release()
        self.memory.close()


async def ask_spin(words: memoryview, count: int) -> list[int]:
    taken = []
    for number in range(1, count + 1):
        start = time.perf_counter_ns()
        words[ASKED] = number
        while words[ANSWERED] != number:
            pass
        taken.append(time.perf_counter_ns() - start)
    return taken


async def answer_spin(words: memoryview, count: int) -> None:
    for number in range(1, count + 1):
        while words[ASKED] != number:
            pass
        words[ANSWERED] = number


async def ask_spin_loop(words: memoryview, count: int) -> list[int]:
    taken = []
    for number in range(1, count + 1):
        start = time.perf_counter_ns()
        words[ASKED] = number
        while words[ANSWERED] != number:
            await asyncio.sleep(0)
        taken.append(time.perf_counter_ns() - start)
    return taken


async def answer_spin_loop(words: memoryview, count: int) -> None:
    for number in range(1, count + 1):
        while words[ASKED] != number:
            await asyncio.sleep(0)
        words[ANSWERED] = number


async def ask_zmq(socket: zmq.asyncio.Socket, request: bytes, count: int) -> list[int]:
    taken = []
    for _ in range(count):
        start = time.perf_counter_ns()
        await socket.send(request)
        await socket.recv()
        taken.append(time.perf_counter_ns() - start)
    return taken


async def answer_zmq(socket: zmq.asyncio.Socket, reply: bytes, count: int) -> None:
    for _ in range(count):
        identity, _ = await socket.recv_multipart()
        await socket.send_multipart([identity, reply])
