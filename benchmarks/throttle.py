"""A TCP proxy that holds either direction of a connection to a rate: a slow network on one machine.

A process of its own, driven by benchmarks.harness through commands:

- open(port) -> port: listens on the loopback and forwards every connection to 127.0.0.1:port.
- limit(bits_per_s): from now on, for all connections, each direction by itself; null is no limit.

What is forwarded waits until a link of that rate would have delivered its last byte. A sleep that ends late makes
the next one shorter by that much, so that the mean is right; an idle link saves nothing up.
There is no latency but that of the rate, no loss, and no limit to what the kernel's own buffers hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import socket
import threading
import time
from typing import Any

from benchmarks.worker import serve

LOOPBACK = "127.0.0.1"
MOST_BYTES = 256 << 10  # forwarded at once
MOST_S = 0.002  # of the link's time, where that is less
LEAST_BYTES = 4 << 10
LATE_S = 0.005  # a gap in the traffic up to which our own lateness is taken for its cause


class Limit:
    """The rate of all directions, which may change at any time; None: no limit."""

    def __init__(self) -> None:
        self.bytes_per_s: float | None = None

    def chunk_bytes(self) -> int:
        if self.bytes_per_s is None:
            return MOST_BYTES
        return max(LEAST_BYTES, min(MOST_BYTES, int(self.bytes_per_s * MOST_S)))


class Pacer:
    """When the bytes of one direction are due."""

    def __init__(self, limit: Limit) -> None:
        self._limit = limit
        self._due = 0.0

    def wait_s(self, count: int, now: float) -> float:
        """How long to hold back the next `count` bytes; negative if they are late."""
        rate = self._limit.bytes_per_s
        if rate is None:
            return 0.0
        start = self._due if now - self._due < LATE_S else now
        self._due = start + count / rate
        return self._due - now


class Proxy:
    """Listeners and their connections, in an event loop of a thread of its own."""

    def __init__(self) -> None:
        self._limit = Limit()
        # epoll sleeps whole milliseconds, which is much of what a short message takes
        self._loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def open(self, port: int) -> dict[str, Any]:
        listener = socket.create_server((LOOPBACK, 0))
        listener.setblocking(False)
        asyncio.run_coroutine_threadsafe(self._accept(listener, port), self._loop)
        return {"port": listener.getsockname()[1]}

    def limit(self, bits_per_s: float | None) -> dict[str, Any]:
        self._limit.bytes_per_s = None if bits_per_s is None else bits_per_s / 8
        return {}

    def close(self) -> None:
        """Ends all connections."""
        asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _accept(self, listener: socket.socket, port: int) -> None:
        with listener:
            async with asyncio.TaskGroup() as connections:
                while True:
                    near, _ = await self._loop.sock_accept(listener)
                    connections.create_task(self._connect(near, port))

    async def _connect(self, near: socket.socket, port: int) -> None:
        """Until both directions have ended, or either has failed: then neither end hears anything more."""
        with near, socket.socket() as far:
            far.setblocking(False)
            # a peer that is gone, as either may be at any time, is no error of ours
            with contextlib.suppress(OSError, ExceptionGroup):
                await self._loop.sock_connect(far, (LOOPBACK, port))
                for end in (near, far):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                async with asyncio.TaskGroup() as directions:
                    directions.create_task(self._forward(near, far))
                    directions.create_task(self._forward(far, near))

    async def _forward(self, source: socket.socket, target: socket.socket) -> None:
        pacer = Pacer(self._limit)
        buffer = memoryview(bytearray(MOST_BYTES))
        while count := await self._loop.sock_recv_into(source, buffer[: self._limit.chunk_bytes()]):
            wait_s = pacer.wait_s(count, time.monotonic())
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            await self._loop.sock_sendall(target, buffer[:count])
        target.shutdown(socket.SHUT_WR)


async def _cancel_others() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def main() -> None:
    proxy = Proxy()
    try:
        serve({"open": proxy.open, "limit": proxy.limit})
    finally:
        proxy.close()


if __name__ == "__main__":
    main()
