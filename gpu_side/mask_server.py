"""The mask peer: products of masks for TEE sides whose masked calls go to somebody else.

Covered: who else reads the connection learns nothing, since it is encrypted, and a TEE side that pinned our key talks
to nobody else; each client has a key stream of its own; every number in a request is checked before it is used; what is
made for a client that does not read it is bounded.
Not covered: how many clients there are, and what they ask for together; this process knows r and u of its clients,
whole. It learns nothing from them as long as it never meets what was masked with them: whoever runs it must have
nothing to do with the GPU side (docs/mask-peer.md).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

import torch
import zmq.asyncio

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.errors import CallRefused, HandshakeRefused
from asynctsqp.integer_weights import Matrix
from asynctsqp.key_stream import BLOCK_BYTES, MOST_BLOCKS, KeyStream, row_blocks, row_words
from asynctsqp.limits import WEIGHT_DIGITS
from asynctsqp.mask_blocks import most_rows
from asynctsqp.messages import MASK_KEY_BYTES, Done, MaskCall, MaskHello, ToGpu, Welcome
from asynctsqp.model_spec import ModelSpec, Op
from asynctsqp.tensor_codec import bytes_of
from gpu_side.executor import Executor, short_rows
from gpu_side.made_weights import MadeWeights
from gpu_side.programs import Programs
from gpu_side.router import Answer, Router
from gpu_side.server import check_model

MOST_AT_ONCE = 4  # products of one client that are being made
MOST_UNREAD_BYTES = 64 << 20  # of those that it has not read: an honest one asks for a quarter of that at a time


class MaskClient:
    """One greeted TEE side: its key stream."""

    def __init__(
        self, key: bytes, spec: ModelSpec, programs: Programs, executor: Executor, unread: Callable[[], int]
    ) -> None:
        """unread: bytes of answers that are on their way."""
        self.calls: set[asyncio.Task[None]] = set()
        self._stream = KeyStream(key)
        self._spec = spec
        self._short_rows = short_rows(spec)
        self._programs = programs
        self._executor = executor
        self._unread = unread
        self._at_once = asyncio.Semaphore(MOST_AT_ONCE)

    async def serve(self, call: MaskCall) -> Answer:
        """Raises CallRefused."""
        (op, layer), channels, width = self._checked(call)
        async with self._at_once:
            if self._unread() > MOST_UNREAD_BYTES:
                raise CallRefused("earlier answers have not been read: too much waits for this client")
            mask = await asyncio.to_thread(self._words, call.address, call.rows, width)
            made = self._executor.buffer(4 * call.rows * channels)
            product = made.view(torch.int32).view(call.rows, channels)
            program = self._programs.of(op, layer)
            times = await self._executor.run(program, (mask,), (product,), call.rows <= self._short_rows[op], (self, 0))
        return Done(call.call_id, *times), bytes_of(made)

    async def close(self) -> None:
        while self.calls:
            await asyncio.wait(self.calls)
        self._executor.forget([(self, 0)])

    def _checked(self, call: MaskCall) -> tuple[Matrix, int, int]:
        """-> the matrix, its N and K."""
        try:
            op = Op(call.op)
            linear = self._spec.linears[op]
        except (ValueError, KeyError):
            raise CallRefused("there is no such matrix") from None
        if not 0 <= call.layer < self._spec.layers_of(op):
            raise CallRefused("there is no such layer")
        channels, width = linear.out_features, linear.in_features
        if not 1 <= call.rows <= most_rows(channels, width):
            raise CallRefused(f"masks come in 1 to {most_rows(channels, width)} rows of this matrix")
        if not 0 <= call.address <= MOST_BLOCKS - call.rows * row_blocks(width):
            raise CallRefused("there is no such address in a key stream")
        return (op, call.layer), channels, width

    def _words(self, address: int, rows: int, width: int) -> torch.Tensor:
        """r: [rows, width] int32 in memory that the device can copy from."""
        count = rows * row_words(width)
        room = self._executor.buffer(4 * count + BLOCK_BYTES).view(torch.int32)
        self._stream.fill(address, count, room.numpy())
        return room[:count].view(rows, row_words(width))[:, :width].contiguous()


class MaskServer(Router[MaskClient]):
    """Serves one checkpoint on one device. Its socket must be a CURVE server's."""

    def __init__(self, socket: zmq.asyncio.Socket, checkpoint: Checkpoint, executor: Executor) -> None:
        super().__init__(socket)
        self._spec = checkpoint.spec
        self._fingerprint = checkpoint.fingerprint()
        self._executor = executor
        self._weights = MadeWeights(checkpoint, executor.device)

    async def _serve(
        self, identity: bytes, client: MaskClient | None, message: ToGpu, payload: memoryview | None
    ) -> Answer | None:
        match message, client:
            case MaskCall(), MaskClient():
                return await client.serve(message)
            case MaskHello(), _:
                return await self._greet(identity, message), None
            case MaskCall(), None:
                raise CallRefused("this connection has not been greeted: send MaskHello first")
        raise HandshakeRefused("this is a mask peer: it answers nothing but requests for masks")

    async def _greet(self, identity: bytes, hello: MaskHello) -> Welcome:
        check_model(hello, self._fingerprint)
        if hello.weight_bits not in WEIGHT_DIGITS:
            raise HandshakeRefused("a mask peer knows weights of 8 and 12 bits")
        if len(hello.key) != MASK_KEY_BYTES:
            raise HandshakeRefused(f"the key of a stream has {MASK_KEY_BYTES} bytes")
        if identity in self._clients or identity in self._greeting:
            raise HandshakeRefused("this connection has been greeted already")
        self._greeting.add(identity)
        try:
            weights = await self._weights.ring(hello.weight_bits, hello.weights)
        finally:
            self._greeting.discard(identity)
        self._clients[identity] = MaskClient(
            hello.key, self._spec, weights, self._executor, partial(self._unread, identity)
        )
        return Welcome(hello.call_id, str(self._executor.device))
