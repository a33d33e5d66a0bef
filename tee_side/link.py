"""The TEE side's link to its GPU side: connect, greet, share memory, and do it again when it was lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import torch

from asynctsqp import doorbell
from asynctsqp.checkpoint import Checkpoint
from asynctsqp.config import EngineOptions
from asynctsqp.errors import BadInputError, GpuSideError, GpuSideLost, HandshakeRefused, ProtocolError, one_line
from asynctsqp.limits import MAX_FRAME_BYTES
from asynctsqp.messages import PROTOCOL_VERSION, Attach, Attached, Hello, Refused, Welcome
from asynctsqp.rpc import Connection
from asynctsqp.shm import Region
from asynctsqp.tensor_codec import WIRE_DTYPES
from tee_side.carriers import Carrier, FrameCarrier, SharedMemoryCarrier

RETRY_S = 0.2

Endpoint = Callable[[], Awaitable[str]]


@dataclass(frozen=True)
class Session:
    """One greeted connection and the way its tensors travel."""

    connection: Connection
    carrier: Carrier
    dtype: torch.dtype

    def close(self) -> None:
        self.connection.close()
        self.carrier.close()


class Link:
    """Holds the current session. Make it with `open`, end it with `close`."""

    def __init__(self, endpoint: Endpoint, hello: Hello, options: EngineOptions, lanes: int, slot_bytes: int) -> None:
        self._endpoint = endpoint
        self._hello = hello
        self._options = options
        self._lanes = lanes
        self._slot_bytes = slot_bytes
        self._doorbell = options.doorbell != "off" and doorbell.supported()
        self._recovery = asyncio.Lock()
        self.session: Session

    @classmethod
    async def open(
        cls,
        endpoint: Endpoint,
        checkpoint: Checkpoint,
        options: EngineOptions,
        lanes: int,
        slot_bytes: int,
    ) -> Link:
        """endpoint: asked for the address at each attempt (a local GPU side is started again, and moves).

        Raises GpuSideUnreachable, HandshakeRefused, SharedMemoryError or ProtocolError.
        """
        hello = Hello(0, PROTOCOL_VERSION, checkpoint.fingerprint(), options.dtype, options.partition)
        link = cls(endpoint, hello, options, lanes, slot_bytes)
        link.session = await link._connect_within(options.reconnect_s)
        return link

    async def recover(self, failed: Session, loss: GpuSideLost) -> None:
        """Replaces a failed session; the first caller does it, the others wait. Raises `loss` if it cannot."""
        async with self._recovery:
            if self.session is not failed:
                return
            if not self._options.reconnect_s:
                raise loss
            failed.close()
            self.session = await self._connect_within(self._options.reconnect_s)

    def close(self) -> None:
        self.session.close()

    async def _connect_within(self, limit_s: float) -> Session:
        loop = asyncio.get_running_loop()
        give_up = loop.time() + limit_s
        while True:
            try:
                return await self._connect()
            except GpuSideError as error:
                if not error.retryable or loop.time() >= give_up:
                    raise
                await asyncio.sleep(RETRY_S)

    async def _connect(self) -> Session:
        connection = await Connection.open(await self._endpoint(), MAX_FRAME_BYTES)
        try:
            await self._greet(connection)
            carrier = await self._carrier(connection)
        except BaseException:
            connection.close()
            raise
        return Session(connection, carrier, WIRE_DTYPES[self._options.dtype])

    async def _greet(self, connection: Connection) -> None:
        answer = await connection.request(0, self._hello)
        if isinstance(answer, Refused):
            raise (HandshakeRefused if answer.bad_input else GpuSideLost)(one_line(answer.reason))
        if not isinstance(answer, Welcome):
            raise ProtocolError("the GPU side answered a greeting with another kind of message")

    async def _carrier(self, connection: Connection) -> Carrier:
        dtype = WIRE_DTYPES[self._options.dtype]
        transport = self._options.transport
        if transport != "binary":
            region = await self._share(connection)
            if region is not None:
                if self._doorbell:
                    connection.use_doorbell(region)
                return SharedMemoryCarrier(region, dtype)
            if transport == "shm":
                raise BadInputError("the GPU side does not see this machine's shared memory: use --transport auto")
        return FrameCarrier(min(self._slot_bytes, MAX_FRAME_BYTES), dtype)

    async def _share(self, connection: Connection) -> Region | None:
        """A region that the other side has proved to see, or None. Its name is gone when this returns."""
        region = Region.create(self._options.shm_name, self._lanes, self._slot_bytes)
        try:
            request = Attach(connection.next_call_id(), region.name, region.lanes, region.slot_bytes, self._doorbell)
            answer = await connection.request(request.call_id, request)
        except BaseException:
            region.close()
            raise
        finally:
            region.unlink()
        if isinstance(answer, Attached) and answer.nonce == region.nonce:
            return region
        region.close()
        return None
