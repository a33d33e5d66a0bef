"""Whatever comes back on a connection, or does not, its calls end: with one error, at their deadlines."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

import asynctsqp
from asynctsqp.messages import Call, Done
from asynctsqp.rpc import Connection
from asynctsqp.sockets import MAX_FRAME_BYTES
from asynctsqp.target import Target
from tests.clients import call
from tests.peers import lying_gpu
from tests.test_hostile_gpu import assert_one_line


@asynccontextmanager
async def connected(endpoint: str) -> AsyncIterator[Connection]:
    connection = await Connection.open(Target.gpu_side(endpoint), MAX_FRAME_BYTES)
    try:
        yield connection
    finally:
        connection.close()


def test_wakes_that_nobody_reads_are_not_kept(tmp_path: Path) -> None:
    """A peer that reads nothing: beyond what ZeroMQ and the kernel hold for it, one waits."""

    async def run(endpoint: str) -> int:
        async with connected(endpoint) as connection:
            for _ in range(50_000):
                connection._wake_peer()
            await asyncio.sleep(0)
            return sum(issubclass(type(thing), asyncio.Future) for thing in gc.get_objects())

    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.setsockopt(zmq.RCVHWM, 1)
        socket.bind(f"ipc://{tmp_path}/deaf.sock")
        assert asyncio.run(asyncio.wait_for(run(f"ipc://{tmp_path}/deaf.sock"), 30)) < 1000


def test_a_call_without_answer_ends_at_its_deadline_and_fails_all_others() -> None:
    async def run(endpoint: str) -> list[Any]:
        settled: list[int] = []
        async with connected(endpoint) as connection:
            calls = [
                connection.call(1, call(1, slot=0), deadline_s=60, settled=lambda: settled.append(1)),
                connection.call(2, call(2, slot=1), deadline_s=0.5, settled=lambda: settled.append(2)),
            ]
            errors = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 10)
            late = connection.call(3, call(3, slot=0), settled=lambda: settled.append(3))
            return [*errors, *await asyncio.gather(late, return_exceptions=True), sorted(settled)]

    with lying_gpu({Call: lambda call: []}) as gpu:
        *errors, settled = asyncio.run(run(gpu.endpoint))
    for error in errors:
        assert isinstance(error, asynctsqp.GpuSideError)
        assert_one_line(error)
    assert settled == [1, 2, 3], "each call gives back its slot exactly once"


def test_time_in_which_we_were_stopped_is_not_the_gpu_sides() -> None:
    """As with Ctrl-Z and `fg`, and a deadline in between: the event loop stands still, and the answer comes after."""

    def later(call: Any) -> list[list[bytes]]:
        time.sleep(5)
        return [[Done(call.call_id, 0.0, 0.0)]]

    async def run(endpoint: str) -> Any:
        async with connected(endpoint) as connection:
            reply = connection.call(1, call(1, slot=0), deadline_s=3)
            await asyncio.sleep(0.2)
            time.sleep(4.5)  # noqa: ASYNC251 - it is what being stopped is like
            return (await asyncio.wait_for(reply, 10))[0]

    with lying_gpu({Call: later}) as gpu:
        assert asyncio.run(run(gpu.endpoint)) == Done(1, 0.0, 0.0)


def test_messages_without_end_do_not_stop_the_deadline() -> None:
    """A GPU side that talks all the time without answering: the deadline comes before the talk has ended."""
    over = threading.Event()

    def talk(call: Any) -> Iterator[list[bytes]]:
        end = time.monotonic() + 8
        while time.monotonic() < end:
            yield [msgspec.msgpack.encode([15])]
        over.set()

    async def run(endpoint: str) -> bool:
        async with connected(endpoint) as connection:
            with pytest.raises(asynctsqp.GpuSideError):
                await connection.call(1, call(1, slot=0), deadline_s=0.5)
            return over.is_set()

    with lying_gpu({Call: talk}) as gpu:
        assert not asyncio.run(run(gpu.endpoint))
