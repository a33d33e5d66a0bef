"""One ROUTER socket and any number of clients, none of which can harm another: of a GPU side, or of a mask peer."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import zmq
import zmq.asyncio

from asynctsqp.errors import AsynctsqpError, CallRefused, DeviceLost, one_line
from asynctsqp.messages import MAX_FRAMES, Alive, Refused, ToGpu, ToTee, decode_to_gpu, encode

MAX_CALLS = 256  # of one client in flight; an honest one has as many as slots
REASON_CHARACTERS = 180  # of a refusal: fits a doorbell's entry
LAST_WORDS_S = 0.5  # until all who have asked a device that is lost have read why
PROBE_S = 1.0  # how often each client is tried; one that is gone is forgotten at the next try

# how an answer, and the tensor that goes with it, gets back to who asked
Reply = Callable[..., Coroutine[Any, Any, None]]
Tensor = memoryview | bytes | None
Answer = tuple[ToTee, Tensor]

log = logging.getLogger(__name__)


class Greeted(Protocol):
    """What a server keeps of a client once it has been greeted."""

    calls: set[asyncio.Task[None]]

    async def close(self) -> None:
        """Waits for running calls, and keeps nothing of the client."""


ClientT = TypeVar("ClientT", bound=Greeted)


class Router(ABC, Generic[ClientT]):
    """Reads requests, has them answered at the same time, and forgets clients that have gone."""

    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        self._socket = socket
        self._clients: dict[bytes, ClientT] = {}
        self._greeting: set[bytes] = set()  # told that we are alive while they wait
        self._tasks: set[asyncio.Task[None]] = set()
        self._sent: dict[bytes, deque[tuple[zmq.MessageTracker, int]]] = {}  # tensors, and their bytes
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # fails with the device

    @abstractmethod
    async def _serve(
        self, identity: bytes, client: ClientT | None, message: ToGpu, payload: memoryview | None
    ) -> Answer | None:
        """The answer to one request; None where there is none. Raises AsynctsqpError for what is refused."""

    async def run(self) -> None:
        """Serves until it is cancelled. Raises DeviceLost when nothing can be served any more."""
        self._start(self._probe())
        receiving = self._start(self._receive())
        try:
            await asyncio.wait((receiving, self._lost), return_when=asyncio.FIRST_COMPLETED)
            if self._lost.done():
                await asyncio.sleep(LAST_WORDS_S)
            (self._lost if self._lost.done() else receiving).result()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for client in self._clients.values():
                await client.close()

    async def _receive(self) -> None:
        while True:
            frames = await self._socket.recv_multipart(copy=False)
            self._dispatch(frames[0].bytes, [frame.buffer for frame in frames[1:]])
            await asyncio.sleep(0)  # a client that floods us must not keep the others' answers waiting

    def _dispatch(self, identity: bytes, frames: list[memoryview]) -> None:
        try:
            if not 1 <= len(frames) <= MAX_FRAMES:
                raise CallRefused(f"a request is a message and at most one tensor, not {len(frames)} frames")
            message = decode_to_gpu(frames[0])
        except AsynctsqpError as error:
            self._start(self._send(identity, Refused(0, one_line(error, REASON_CHARACTERS), bad_input=True)))
            return
        payload = frames[1] if len(frames) == MAX_FRAMES else None
        self._handle(identity, message, payload, partial(self._send, identity))

    def _handle(self, identity: bytes, message: ToGpu, payload: memoryview | None, reply: Reply) -> None:
        client = self._clients.get(identity)
        if client is None:
            self._start(self._answer(identity, None, message, payload, reply))
            return
        if len(client.calls) >= MAX_CALLS:
            task = self._start(reply(Refused(message.call_id, "too many calls at once", bad_input=False)))
        else:
            task = self._start(self._answer(identity, client, message, payload, reply))
        client.calls.add(task)
        task.add_done_callback(client.calls.discard)

    async def _answer(
        self, identity: bytes, client: ClientT | None, message: ToGpu, payload: memoryview | None, reply: Reply
    ) -> None:
        answer: Answer | None
        try:
            answer = await self._serve(identity, client, message, payload)
        except AsynctsqpError as error:
            reason = one_line(error, REASON_CHARACTERS)
            answer = Refused(message.call_id, reason, bad_input=error.exit_code == 2), None
            if isinstance(error, DeviceLost) and not self._lost.done():
                self._lost.set_exception(error)
        except Exception as error:  # out of memory, a failed kernel, a file that went away: the asker must hear of it
            reason = one_line(error, REASON_CHARACTERS)
            log.warning("a call failed: %s", reason)
            answer = Refused(message.call_id, f"the GPU side failed: {reason}", bad_input=False), None
        if answer is not None:
            await reply(*answer)

    async def _send(self, identity: bytes, message: ToTee, tensor: Tensor = None) -> None:
        """Never waits for a client: one that is gone, or does not read what it asked for, is forgotten."""
        frames = [identity, encode(message)] if tensor is None else [identity, encode(message), tensor]
        unread = None if tensor is None else self._sent.get(identity)
        try:
            tracker = await self._socket.send_multipart(
                frames, flags=zmq.DONTWAIT, copy=False, track=unread is not None
            )
        except zmq.ZMQError:
            self._forget(identity)
            return
        if tensor is not None and unread is not None and tracker is not None:
            unread.append((tracker, memoryview(tensor).nbytes))

    def _unread(self, identity: bytes) -> int:
        """Bytes of a client's tensors that are still in this process's memory. Counts from the first time it is asked.

        They are sent in their order, and more than the kernel takes of them only to a client that reads.
        """
        if identity not in self._clients:
            return 0
        sent = self._sent.setdefault(identity, deque())
        while sent and sent[0][0].done:
            sent.popleft()
        return sum(size for _, size in sent)

    async def _probe(self) -> None:
        while True:
            await asyncio.sleep(PROBE_S)
            for identity in [*self._clients, *self._greeting]:
                await self._send(identity, Alive())

    def _forget(self, identity: bytes) -> None:
        self._sent.pop(identity, None)
        client = self._clients.pop(identity, None)
        if client is not None:
            log.info("a client is gone; %d left", len(self._clients))
            self._start(self._close(client))

    async def _close(self, client: ClientT) -> None:
        await client.close()

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
