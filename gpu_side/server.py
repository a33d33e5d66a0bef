"""The GPU side's event loop: one ROUTER socket, any number of TEE sides, none of which can harm another."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import zmq
import zmq.asyncio

from asynctsqp.checkpoint import Checkpoint, short
from asynctsqp.compression import NAMES as COMPRESSIONS
from asynctsqp.doorbell import Doorbell
from asynctsqp.errors import AsynctsqpError, CallRefused, HandshakeRefused, ProtocolError, one_line
from asynctsqp.layouts import OPERATIONS
from asynctsqp.messages import (
    MAX_FRAMES,
    PROTOCOL_VERSION,
    Alive,
    Attach,
    Call,
    Hello,
    Refused,
    ToGpu,
    ToTee,
    Wake,
    Welcome,
    decode_to_gpu,
    encode,
)
from asynctsqp.tensor_codec import WIRE_DTYPES
from gpu_side.client import MAX_CALLS, Client
from gpu_side.executor import Executor, is_short
from gpu_side.weights import Weights

REASON_CHARACTERS = 180  # of a refusal: fits a doorbell's entry
PROBE_S = 1.0  # how often each client is tried; one that is gone is forgotten at the next try

# how an answer, and the tensor that goes with it, gets back to who asked
Reply = Callable[..., Coroutine[Any, Any, None]]

log = logging.getLogger(__name__)


class Server:
    """Serves one checkpoint on one device.

    dtype: the only one that clients may ask for, or None for any; the weights of a dtype are made at its first use.
    """

    def __init__(
        self, socket: zmq.asyncio.Socket, checkpoint: Checkpoint, executor: Executor, dtype: str | None
    ) -> None:
        self._socket = socket
        self._checkpoint = checkpoint
        self._fingerprint = checkpoint.fingerprint()
        self._executor = executor
        self._dtype = dtype
        self._weights: dict[str, asyncio.Task[Weights]] = {}
        self._making = asyncio.Lock()
        self._clients: dict[bytes, Client] = {}
        self._greeting: set[bytes] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serves until it is cancelled."""
        self._start(self._probe())
        try:
            while True:
                frames = await self._socket.recv_multipart(copy=False)
                self._dispatch(frames[0].bytes, [frame.buffer for frame in frames[1:]])
                await asyncio.sleep(0)  # a client that floods us must not keep the others' answers waiting
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for client in self._clients.values():
                await client.close()

    async def weights(self, dtype: str) -> Weights:
        """The weights in a dtype; made once, however many clients ask at the same time."""
        known = self._weights.get(dtype)
        if known is None or (known.done() and known.exception() is not None):  # a load that failed is tried again
            self._weights[dtype] = asyncio.create_task(self._make(dtype))
        return await asyncio.shield(self._weights[dtype])

    async def _make(self, dtype: str) -> Weights:
        async with self._making:  # one after another: each is checked against the memory that is left by then
            return await asyncio.to_thread(Weights, self._checkpoint, dtype, self._executor.device)

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
        elif len(client.calls) >= MAX_CALLS:
            self._start(reply(Refused(message.call_id, "too many calls at once", bad_input=False)))
        else:
            task = self._start(self._answer(identity, client, message, payload, reply))
            client.calls.add(task)
            task.add_done_callback(client.calls.discard)

    async def _answer(
        self, identity: bytes, client: Client | None, message: ToGpu, payload: memoryview | None, reply: Reply
    ) -> None:
        answer: ToTee
        tensor: memoryview | bytes | None = None
        try:
            match message, client:
                case Hello(), _:
                    answer = await self._greet(identity, message)
                case _, None:
                    raise CallRefused("this connection has not been greeted: send Hello first")
                case Attach(), Client():
                    answer = client.attach(message)
                    if client.doorbell is not None:
                        client.listener = self._start(self._listen(identity, client, client.doorbell))
                case Call(), Client():
                    answer, tensor = await client.serve(message, payload)
                case Wake(), Client():
                    if client.doorbell is not None:
                        client.doorbell.wake()
                    return
        except AsynctsqpError as error:
            answer = Refused(message.call_id, one_line(error, REASON_CHARACTERS), bad_input=error.exit_code == 2)
        except Exception as error:  # out of memory, a failed kernel, a file that went away: the asker must hear of it
            log.warning("a call failed: %s", one_line(error, REASON_CHARACTERS))
            answer = Refused(
                message.call_id, f"the GPU side failed: {one_line(error, REASON_CHARACTERS)}", bad_input=False
            )
        await reply(answer, tensor)

    async def _listen(self, identity: bytes, client: Client, doorbell: Doorbell) -> None:
        """Serves one client's doorbell until the client is forgotten, or breaks it."""

        async def reply(answer: ToTee, tensor: memoryview | bytes | None = None) -> None:
            doorbell.send(encode(answer))

        try:
            while True:
                message = decode_to_gpu(await doorbell.receive())
                if not isinstance(message, Call) or message.tensors is not None:
                    raise ProtocolError("only calls go through a doorbell, and their tensors beside it")
                if self._executor.inline and is_short(message.rows, message.keys):
                    await self._answer(identity, client, message, None, reply)
                    await asyncio.sleep(0)  # whoever keeps its ring full must not keep the others waiting
                else:
                    self._handle(identity, message, None, reply)
        except ProtocolError as error:
            log.warning("a client broke its doorbell: %s", error)
            self._forget(identity)

    async def _greet(self, identity: bytes, hello: Hello) -> Welcome:
        if hello.version != PROTOCOL_VERSION:
            raise HandshakeRefused(f"the GPU side speaks protocol {PROTOCOL_VERSION}, the TEE side {hello.version}")
        if hello.fingerprint != self._fingerprint:
            raise HandshakeRefused(
                f"the GPU side serves another model ({short(self._fingerprint)}) "
                f"than the TEE side runs ({short(hello.fingerprint)})"
            )
        if hello.dtype not in WIRE_DTYPES or self._dtype not in (None, hello.dtype):
            raise HandshakeRefused(f"the GPU side serves dtype {self._dtype or 'names only'}, not {hello.dtype}")
        if hello.partition not in OPERATIONS:
            raise HandshakeRefused(f"the GPU side knows no partition {one_line(hello.partition, 40)}")
        if hello.compress not in COMPRESSIONS:
            raise HandshakeRefused(f"the GPU side knows no compression {one_line(hello.compress, 40)}")
        if identity in self._clients or identity in self._greeting:
            raise HandshakeRefused("this connection has been greeted already")
        self._greeting.add(identity)  # told that we are alive while the weights are made
        try:
            weights = await self.weights(hello.dtype)
            async with self._making:  # one at a time, as the weights themselves: both ask what memory is free
                await asyncio.to_thread(weights.prepare, hello.partition)
        finally:
            self._greeting.discard(identity)
        self._clients[identity] = Client(
            hello, self._checkpoint.spec, weights, self._executor, partial(self._wake, identity)
        )
        return Welcome(hello.call_id, str(self._executor.device))

    async def _send(self, identity: bytes, message: ToTee, tensor: memoryview | bytes | None = None) -> None:
        """Never waits for a client: one that is gone, or does not read what it asked for, is forgotten."""
        frames = [identity, encode(message)] if tensor is None else [identity, encode(message), tensor]
        try:
            await self._socket.send_multipart(frames, flags=zmq.DONTWAIT, copy=False)
        except zmq.ZMQError:
            self._forget(identity)

    def _wake(self, identity: bytes) -> None:
        self._start(self._send(identity, Wake()))

    async def _probe(self) -> None:
        while True:
            await asyncio.sleep(PROBE_S)
            for identity in [*self._clients, *self._greeting]:
                await self._send(identity, Alive())

    def _forget(self, identity: bytes) -> None:
        client = self._clients.pop(identity, None)
        if client is not None:
            log.info("a client is gone; %d left", len(self._clients))
            self._start(self._close(client))

    async def _close(self, client: Client) -> None:
        await client.close()

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
