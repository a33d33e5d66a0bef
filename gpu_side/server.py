"""The GPU side: operations of one checkpoint for any number of TEE sides."""

from __future__ import annotations

import asyncio
import logging
from functools import partial

import zmq.asyncio

from asynctsqp.checkpoint import Checkpoint, short
from asynctsqp.compression import NAMES as COMPRESSIONS
from asynctsqp.doorbell import Doorbell
from asynctsqp.errors import CallRefused, HandshakeRefused, ProtocolError, one_line
from asynctsqp.layouts import OPERATIONS
from asynctsqp.limits import WEIGHT_DIGITS
from asynctsqp.messages import (
    PROTOCOL_VERSION,
    Attach,
    Call,
    Hello,
    MaskCall,
    MaskHello,
    ToGpu,
    ToTee,
    Wake,
    Welcome,
    decode_to_gpu,
    encode,
)
from asynctsqp.tensor_codec import WIRE_DTYPES
from gpu_side.client import Client
from gpu_side.executor import Executor
from gpu_side.made_weights import MadeWeights
from gpu_side.programs import FloatPrograms, Programs
from gpu_side.router import Answer, Router
from gpu_side.weights import Weights

log = logging.getLogger(__name__)


class Server(Router[Client]):
    """Serves one checkpoint on one device.

    dtype: the only one that clients may ask for, or None for any; the weights of a dtype are made at its first use.
    Integer weights are made for any client that asks for them: `dtype` is about floating-point products.
    """

    def __init__(
        self, socket: zmq.asyncio.Socket, checkpoint: Checkpoint, executor: Executor, dtype: str | None
    ) -> None:
        super().__init__(socket)
        self._checkpoint = checkpoint
        self._fingerprint = checkpoint.fingerprint()
        self._executor = executor
        self._dtype = dtype
        self.weights = MadeWeights(checkpoint, executor.device)

    async def _serve(
        self, identity: bytes, client: Client | None, message: ToGpu, payload: memoryview | None
    ) -> Answer | None:
        match message, client:
            case Call(), Client():
                return await client.serve(message, payload)
            case Hello(), _:
                return await self._greet(identity, message), None
            case ((MaskHello() | MaskCall()), _):
                raise HandshakeRefused("this is a GPU side, no mask peer: start one with --mask-peer-secret")
            case _, None:
                raise CallRefused("this connection has not been greeted: send Hello first")
            case Attach(), Client():
                attached = client.attach(message)
                if client.doorbell is not None:
                    client.listener = self._start(self._listen(identity, client, client.doorbell))
                return attached, None
            case Wake(), Client():
                if client.doorbell is not None:
                    client.doorbell.wake()
        return None

    async def _listen(self, identity: bytes, client: Client, doorbell: Doorbell) -> None:
        """Serves one client's doorbell until the client is forgotten, or breaks it."""

        async def reply(answer: ToTee, tensor: memoryview | bytes | None = None) -> None:
            doorbell.send(encode(answer))

        try:
            while True:
                message = decode_to_gpu(await doorbell.receive())
                if not isinstance(message, Call) or message.tensors is not None:
                    raise ProtocolError("only calls go through a doorbell, and their tensors beside it")
                if self._executor.inline and client.is_short(message):
                    await self._answer(identity, client, message, None, reply)
                else:
                    self._handle(identity, message, None, reply)
                await asyncio.sleep(0)  # whoever keeps its ring full must not keep the others waiting
        except ProtocolError as error:
            log.warning("a client broke its doorbell: %s", error)
            self._forget(identity)

    async def _greet(self, identity: bytes, hello: Hello) -> Welcome:
        check_model(hello, self._fingerprint)
        self._check_arithmetic(hello)
        if hello.partition not in OPERATIONS:
            raise HandshakeRefused(f"the GPU side knows no partition {one_line(hello.partition, 40)}")
        if hello.compress not in COMPRESSIONS:
            raise HandshakeRefused(f"the GPU side knows no compression {one_line(hello.compress, 40)}")
        if identity in self._clients or identity in self._greeting:
            raise HandshakeRefused("this connection has been greeted already")
        self._greeting.add(identity)  # told that we are alive while the weights are made
        try:
            programs = await self._programs(hello)
        finally:
            self._greeting.discard(identity)
        self._clients[identity] = Client(
            hello,
            self._checkpoint.spec,
            programs,
            self._executor,
            partial(self._wake, identity),
            partial(self._unread, identity),
        )
        return Welcome(hello.call_id, str(self._executor.device))

    def _check_arithmetic(self, hello: Hello) -> None:
        if hello.weight_bits not in (0, *WEIGHT_DIGITS):
            raise HandshakeRefused("the GPU side knows weights of 8 and 12 bits")
        if hello.weight_bits and hello.partition != "shielded":
            raise HandshakeRefused("integer weights are for partition shielded")
        if hello.dtype not in WIRE_DTYPES:
            raise HandshakeRefused(f"the GPU side knows no dtype {one_line(hello.dtype, 40)}")
        if not hello.weight_bits and self._dtype not in (None, hello.dtype):
            raise HandshakeRefused(f"the GPU side serves dtype {self._dtype}, not {hello.dtype}")

    async def _programs(self, hello: Hello) -> Programs:
        if hello.weight_bits:
            return await self.weights.ring(hello.weight_bits, hello.weights)
        weights = await self.weights.of(hello.dtype)
        if not isinstance(weights, Weights):
            raise HandshakeRefused("the GPU side knows no such dtype")
        async with self.weights.making:  # as the weights themselves: both ask what memory is free
            await asyncio.to_thread(weights.prepare, hello.partition)
        return FloatPrograms(self._checkpoint.spec, weights)

    def _wake(self, identity: bytes) -> None:
        self._start(self._send(identity, Wake()))


def check_model(hello: Hello | MaskHello, fingerprint: bytes) -> None:
    """Raises HandshakeRefused where the other side speaks another protocol or runs another model."""
    if hello.version != PROTOCOL_VERSION:
        raise HandshakeRefused(f"the GPU side speaks protocol {PROTOCOL_VERSION}, the TEE side {hello.version}")
    if hello.fingerprint != fingerprint:
        raise HandshakeRefused(
            f"the GPU side serves another model ({short(fingerprint)}) "
            f"than the TEE side runs ({short(hello.fingerprint)})"
        )
