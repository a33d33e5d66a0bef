"""The enclave's link to its mask peer: connect, greet with a fresh key, ask for products of masks.

Covered: the connection is made with nobody but the holder of the pinned key, and encrypted (ZeroMQ's CURVE). Each has a
key stream of its own, whose addresses are asked for once; rows that were asked for on a connection that is lost are
burnt with its key. An answer is bound to its question by call_id, and has the size that our own tables say.
Not covered: whether an answer is right, which tee_side/freivalds finds out when it is used; a peer that tells the GPU
side what it knows (docs/mask-peer.md).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from asynctsqp.errors import (
    AsynctsqpError,
    CallRefused,
    GpuSideLost,
    ProtocolError,
    one_line,
)
from asynctsqp.integer_weights import Matrix
from asynctsqp.key_stream import KeyStream, new_key, row_words
from asynctsqp.mask_blocks import most_rows
from asynctsqp.messages import PROTOCOL_VERSION, Done, MaskCall, MaskHello, Refused
from asynctsqp.rpc import Connection
from asynctsqp.target import Target
from tee_side.link import ANSWER_BYTES, connect_within, greet
from tee_side.stock import Batch

MOST_LOSSES = 5  # over one question, while --reconnect-s makes new connections


@dataclass(frozen=True)
class Identity:
    """What the peer is greeted with, as messages.MaskHello has it."""

    fingerprint: bytes
    weight_bits: int
    weights: bytes


@dataclass(frozen=True)
class _Session:
    connection: Connection
    stream: KeyStream


class MaskPeer:
    """Holds the current session. Make it with `open`, end it with `close`."""

    def __init__(
        self, target: Target, identity: Identity, shapes: Mapping[Matrix, tuple[int, int]], reconnect_s: float
    ) -> None:
        self._target = target
        self._identity = identity
        self._shapes = shapes
        self._reconnect_s = reconnect_s
        self._most_frame_bytes = ANSWER_BYTES + max(4 * n * most_rows(n, k) for n, k in shapes.values())
        self._recovery = asyncio.Lock()
        self._session: _Session

    @classmethod
    async def open(
        cls, target: Target, identity: Identity, shapes: Mapping[Matrix, tuple[int, int]], reconnect_s: float
    ) -> MaskPeer:
        """shapes: (N, K) of every matrix. Raises GpuSideUnreachable, HandshakeRefused or ProtocolError."""
        peer = cls(target, identity, shapes, reconnect_s)
        peer._session = await connect_within(reconnect_s, peer._connect)
        return peer

    @property
    def failure(self) -> AsynctsqpError | None:
        """What the connection was lost to, if it was and there will be no other."""
        return None if self._reconnect_s else self._session.connection.lost

    async def ask(self, matrix: Matrix, rows: int) -> Batch:
        """New rows of a matrix: at most mask_blocks.most_rows. Cancelled, it leaves them to nobody.

        Raises GpuSideLost if the peer is gone and cannot be reached again in time, CallRefused or ProtocolError.
        """
        for _ in range(MOST_LOSSES):
            session = self._session
            try:
                session.connection.check()
                return await self._ask(session, matrix, rows)
            except GpuSideLost as loss:
                await self._recover(session, loss)
        raise GpuSideLost(f"{self._target} was lost {MOST_LOSSES} times over one question: something in it ends it")

    def close(self) -> None:
        self._session.connection.close()

    async def _ask(self, session: _Session, matrix: Matrix, rows: int) -> Batch:
        channels, width = self._shapes[matrix]
        connection = session.connection
        address = session.stream.take(rows * row_words(width))
        call = MaskCall(connection.next_call_id(), *matrix, address, rows)
        answer, frame, _ = await connection.call(call.call_id, call)
        if isinstance(answer, Refused):
            raise CallRefused(f"{self._target} refused a call: {one_line(answer.reason)}")
        if not isinstance(answer, Done) or frame is None or frame.nbytes != 4 * rows * channels:
            raise ProtocolError(f"{self._target} sent something else than the masks it was asked for")
        product = np.frombuffer(frame, np.int32).reshape(rows, channels)  # the message's own memory, which is private
        return Batch(session.stream, address, product)

    async def _recover(self, failed: _Session, loss: GpuSideLost) -> None:
        """Replaces a failed session; the first caller does it, the others wait. Raises `loss` if it cannot."""
        async with self._recovery:
            if self._session is not failed:
                return
            if not self._reconnect_s:
                raise loss
            failed.connection.close()
            self._session = await connect_within(self._reconnect_s, self._connect)

    async def _connect(self) -> _Session:
        connection = await Connection.open(self._target, self._most_frame_bytes)
        try:
            key = new_key()  # of this connection only: an earlier one's rows may have been seen by nobody knows whom
            own = self._identity
            hello = MaskHello(0, PROTOCOL_VERSION, own.fingerprint, own.weight_bits, own.weights, key)
            await greet(connection, hello, str(self._target))
        except BaseException:
            connection.close()
            raise
        return _Session(connection, KeyStream(key))


async def reach(target: Target, reconnect_s: float) -> None:
    """Raises GpuSideUnreachable if nobody there has the key: known before all weights are read."""

    async def connect() -> None:
        (await Connection.open(target, ANSWER_BYTES)).close()

    await connect_within(reconnect_s, connect)
