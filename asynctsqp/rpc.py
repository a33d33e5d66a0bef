"""The TEE side's end of one connection, to a GPU side or a mask peer: many calls in flight, each a future.

One task reads the socket; a doorbell is read by whoever waits for an answer.

A connection lives once. When it is lost, late or hostile it fails every waiting call with the cause and never
comes back: link.py on the TEE side decides whether to make another.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import zmq
import zmq.asyncio

from asynctsqp.doorbell import Doorbell, Ring
from asynctsqp.errors import GpuSideError, GpuSideLost, GpuSideUnreachable, ProtocolError, one_line
from asynctsqp.messages import (
    MAX_FRAMES,
    Alive,
    Attached,
    Done,
    Refused,
    ToGpu,
    ToTee,
    Wake,
    Welcome,
    decode_to_tee,
    encode,
)
from asynctsqp.monitor import Monitor
from asynctsqp.shm import Region
from asynctsqp.sockets import client_socket
from asynctsqp.target import Target

CONNECT_TIMEOUT_S = 5.0
CALL_DEADLINE_S = 60.0
LOOK_S = 1.0  # between two looks at the deadlines
SILENCE_S = 10.0  # of a handshake; the GPU side says each second that it is alive while it loads

Answer = Welcome | Attached | Done | Refused
Reply = tuple[ToTee, memoryview | None, float]  # the answer, the frame beside it, when it was read


@dataclass(slots=True)
class _Pending:
    """One call that waits for its answer. It outlives the future's cancellation: the slot is still in use."""

    future: asyncio.Future[Reply]
    deadline: float  # on Connection's own clock, which the last look has set
    settled: Callable[[], None]


class Connection:
    """One DEALER connection to a GPU side or a mask peer. Make it with `open`, end it with `close`."""

    def __init__(self, target: Target, max_frame_bytes: int) -> None:
        self._target = target
        self.lost: GpuSideError | None = None
        self._context = zmq.asyncio.Context()
        self._socket = client_socket(self._context, max_frame_bytes, target.key)
        self._monitor = Monitor(self._socket)
        self._pending: dict[int, _Pending] = {}
        self._call_ids = itertools.count(1)
        self._heard = 0  # messages so far
        self._awake_s = 0.0  # a clock that stands still while this process is stopped, as with Ctrl-Z
        self._doorbell: Doorbell | None = None
        self._waking: asyncio.Future[Any] | None = None  # the last Wake, on its way or gone
        self._readers = 0  # of the doorbell's ring: all that wait for an answer
        self._abandoned = asyncio.Event()  # there are calls that nobody waits for
        self._ended = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def open(cls, target: Target, max_frame_bytes: int) -> Connection:
        """Raises GpuSideUnreachable if nobody there speaks ZeroMQ, or has the key."""
        connection = cls(target, max_frame_bytes)
        try:
            connection._socket.connect(target.endpoint)
            made = await asyncio.wait_for(connection._monitor.made(), CONNECT_TIMEOUT_S)
        except (zmq.ZMQError, TimeoutError):
            made = False
        except BaseException:
            connection.close()
            raise
        if not made:
            connection.close()
            raise GpuSideUnreachable(target.unreachable)
        connection._tasks = [
            asyncio.create_task(loop()) for loop in (connection._read, connection._watch_peer, connection._watch_time)
        ]
        return connection

    def next_call_id(self) -> int:
        return next(self._call_ids)

    def call(
        self,
        call_id: int,
        message: ToGpu,
        frames: Sequence[memoryview | bytes] = (),
        deadline_s: float = CALL_DEADLINE_S,
        settled: Callable[[], None] = lambda: None,
    ) -> asyncio.Future[Reply]:
        """Sends `message` (and at most one frame of tensors) and returns the future of its answer, without waiting.

        settled: called exactly once, when the other side can no longer touch what the call lent it: its answer
        is here, or the connection is gone. A cancelled future does not settle its call.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Reply] = loop.create_future()
        if self.lost is not None:
            future.set_exception(self.lost.again())
            settled()
            return future
        self._pending[call_id] = _Pending(future, self._awake_s + LOOK_S + deadline_s, settled)
        if self._doorbell is None:
            self._socket.send_multipart([encode(message), *frames], copy=not frames)
        else:
            self._doorbell.send(encode(message))
        return future

    async def answer(self, reply: asyncio.Future[Reply]) -> Reply:
        """Waits for what `call` has given.

        Whoever waits for an answer through a doorbell reads there, for all others too: so it goes on in the very turn
        of the loop in which its own is here.
        """
        if self._doorbell is not None:
            self._readers += 1
            try:
                await self._read_ring(self._doorbell, reply.done)
            finally:
                self._readers -= 1
                if self._pending and not self._readers:  # calls whose callers have left
                    self._abandoned.set()
        return await reply

    def use_doorbell(self, region: Region, looks: Callable[[], int]) -> None:
        """From here on calls and their answers go through the region's rings; `close` lets go of the region.

        looks: as Doorbell wants it.
        """
        outgoing, incoming = Ring(region.call_ring()), Ring(region.answer_ring())

        def share() -> int:
            """All readers take turns."""
            return -(-looks() // max(1, self._readers))

        self._doorbell = Doorbell(outgoing, incoming, self._wake_peer, share)
        self._tasks.append(asyncio.create_task(self._read_abandoned(self._doorbell)))

    async def request(self, call_id: int, message: ToGpu, limit_s: float) -> ToTee:
        """`call`, for the messages of the handshake: also ends soon where the other side does not say it is alive."""
        reply = self.call(call_id, message, deadline_s=limit_s)
        while not reply.done():
            silent_since = self._heard
            await asyncio.wait((reply,), timeout=SILENCE_S)
            if not reply.done() and self._heard == silent_since:
                self._fail(
                    GpuSideLost(f"what listens at {self._target.endpoint} does not answer as a {self._target.kind}")
                )
        return reply.result()[0]

    @property
    def answered(self) -> bool:
        """Whether an answer is known to be here that nobody has read; of those in messages, none is."""
        return self.lost is None and self._doorbell is not None and self._doorbell.waiting()

    def check(self) -> None:
        """Raises what the connection was lost to, if it was."""
        if self.lost is not None:
            raise self.lost.again()

    async def ended(self) -> None:
        """Waits until it is lost."""
        await self._ended.wait()

    def close(self) -> None:
        """Ends the connection, once; calls that still wait fail with GpuSideLost."""
        if self._context.closed:
            return
        self._fail(GpuSideLost("the connection was closed"))
        for task in self._tasks:
            task.cancel()
        self._context.term()
        if self._doorbell is not None:
            self._doorbell.close()

    async def _read(self) -> None:
        with self._failing_on_nonsense():
            while self.lost is None:
                frames = await self._socket.recv_multipart(copy=False)
                if len(frames) > MAX_FRAMES:
                    raise ProtocolError("a message of too many frames")
                self._accept(frames[0].buffer, frames[1].buffer if len(frames) == MAX_FRAMES else None)
                await asyncio.sleep(0)  # a side that never stops talking must not keep the deadlines from passing

    async def _read_abandoned(self, doorbell: Doorbell) -> None:
        """Reads while nobody waits, so that the slots of calls whose callers have left come back."""
        while self.lost is None:
            await self._abandoned.wait()
            self._abandoned.clear()
            await self._read_ring(doorbell, lambda: self._readers > 0 or not self._pending)

    async def _read_ring(self, doorbell: Doorbell, done: Callable[[], bool]) -> None:
        with self._failing_on_nonsense():
            while not done():
                await doorbell.arrival(done)
                while not done() and (message := doorbell.pop()) is not None:
                    answer = decode_to_tee(message)
                    if not isinstance(answer, Done | Refused):
                        raise ProtocolError("only answers to calls go through a doorbell")
                    self._settle(answer, None)
                if not done():
                    await asyncio.sleep(0)  # first those whose answers these were, then the next look

    @contextlib.contextmanager
    def _failing_on_nonsense(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever ends a reader must reach those who wait for it
            self._fail(ProtocolError(f"{self._target} broke the protocol: {one_line(error)}"))

    def _accept(self, message: bytes | memoryview, tensor: memoryview | None) -> None:
        answer = decode_to_tee(message)
        self._heard += 1
        if tensor is not None and not isinstance(answer, Done):
            raise ProtocolError("a tensor beside a message that has none")
        match answer:
            case Alive():
                return
            case Wake():
                if self._doorbell is not None:
                    self._doorbell.wake()
                return
        self._settle(answer, tensor)

    def _settle(self, answer: Answer, tensor: memoryview | None) -> None:
        """Hands an answer to the call that waits for it."""
        pending = self._pending.pop(answer.call_id, None)
        if pending is None:
            raise ProtocolError("an answer that nobody asked for")
        pending.settled()
        if not pending.future.done():
            pending.future.set_result((answer, tensor, time.perf_counter()))

    def _wake_peer(self) -> None:
        """One at a time: a peer that reads nothing but its ring would have us keep them all."""
        if self._waking is None or self._waking.done():
            self._waking = asyncio.ensure_future(self._socket.send(encode(Wake())))

    async def _watch_peer(self) -> None:
        await self._monitor.ended()
        self._fail(GpuSideLost(f"{self._target} is gone: start it again, or use --reconnect-s"))

    async def _watch_time(self) -> None:
        """One look a second instead of one timer a call.

        A look that comes much too late is nobody else's doing: this process was stopped, perhaps the other one too.
        """
        loop = asyncio.get_running_loop()
        while self.lost is None:
            before = loop.time()
            await asyncio.sleep(LOOK_S)
            self._awake_s += min(loop.time() - before, 2 * LOOK_S)
            if any(pending.deadline < self._awake_s for pending in self._pending.values()):
                self._fail(GpuSideLost(f"{self._target} did not answer in time"))

    def _fail(self, cause: GpuSideError) -> None:
        if self.lost is not None:
            return
        self.lost = cause
        self._ended.set()
        pending, self._pending = self._pending, {}
        if self._doorbell is not None:
            self._doorbell.wake()  # who reads has nothing to wait for any more
        for call in pending.values():
            call.settled()
            if not call.future.done():
                call.future.set_exception(cause.again())
                call.future.exception()  # marks it as seen: a call whose caller has left is no news
        self._monitor.close()
        self._socket.close()  # what it still sends would wait in our memory for somebody to read it
