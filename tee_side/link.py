"""The TEE side's link to its GPU side: connect, greet, share memory, and do it again when it was lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from asynctsqp import doorbell
from asynctsqp.checkpoint import Checkpoint
from asynctsqp.compression import Compression
from asynctsqp.config import EngineOptions
from asynctsqp.errors import (
    GpuSideError,
    GpuSideLost,
    HandshakeRefused,
    ProtocolError,
    one_line,
)
from asynctsqp.layouts import Layouts
from asynctsqp.limits import MAX_FRAME_BYTES, MOST_LOADING_S, SLOT_ALIGNMENT
from asynctsqp.messages import PROTOCOL_VERSION, Attach, Attached, Hello, MaskHello, Refused, Welcome
from asynctsqp.rpc import CALL_DEADLINE_S, Connection
from asynctsqp.shm import Region
from asynctsqp.target import Target
from tee_side.carriers import Carrier, MessageCarrier, SharedMemoryCarrier
from tee_side.pace import Pace
from tee_side.plans import Plans
from tee_side.room import Room
from tee_side.seals import Sealer

RETRY_S = 0.2
ANSWER_BYTES = SLOT_ALIGNMENT  # of a message without its tensor, at most
DEVICES = ("cpu", "cuda")  # kinds of them that rooms may differ for

Endpoint = Callable[[], Awaitable[str]]
Rooms = Callable[[str], Room]  # by the GPU side's device
Made = TypeVar("Made")


async def connect_within(limit_s: float, connect: Callable[[], Awaitable[Made]]) -> Made:
    """What `connect` makes, tried again where that can help until the time is over."""
    loop = asyncio.get_running_loop()
    give_up = loop.time() + limit_s
    while True:
        try:
            return await connect()
        except GpuSideError as error:
            if not error.retryable or loop.time() >= give_up:
                raise
            await asyncio.sleep(RETRY_S)


async def greet(connection: Connection, hello: Hello | MaskHello, who: str) -> Welcome:
    """who: is greeted, as messages name it. Raises HandshakeRefused, GpuSideLost or ProtocolError."""
    answer = await connection.request(hello.call_id, hello, MOST_LOADING_S)
    if isinstance(answer, Refused):
        reason = f"{who} refused: {one_line(answer.reason) or 'it does not say why'}"
        raise (HandshakeRefused if answer.bad_input else GpuSideLost)(reason)
    if not isinstance(answer, Welcome):
        raise ProtocolError(f"{who} answered a greeting with another kind of message")
    return answer


@dataclass(frozen=True)
class Session:
    """One greeted connection and the way its tensors travel."""

    connection: Connection
    carrier: Carrier
    layouts: Layouts
    plans: Plans
    device: str  # of the GPU side, as it says
    room: Room

    def close(self) -> None:
        self.connection.close()
        self.carrier.close()


class Link:
    """Holds the current session. Make it with `open`, end it with `close`."""

    def __init__(
        self, endpoint: Endpoint, hello: Hello, options: EngineOptions, layouts: Layouts, rooms: Rooms
    ) -> None:
        self._endpoint = endpoint
        self.fingerprint = hello.fingerprint  # of the model
        self._hello = hello
        self._options = options
        self._layouts = layouts
        self._rooms = rooms
        self._doorbell = options.doorbell != "off" and doorbell.supported()
        self._recovery = asyncio.Lock()
        self.pace = Pace(lambda: self.session.connection.answered)
        self.session: Session

    @classmethod
    async def open(
        cls,
        endpoint: Endpoint,
        checkpoint: Checkpoint,
        options: EngineOptions,
        layouts: Layouts,
        rooms: Rooms,
        sealer: Sealer,
    ) -> Link:
        """endpoint: asked for the address at each attempt (a local GPU side is started again, and moves); rooms: what
        the GPU side's device wants.

        Raises GpuSideUnreachable, HandshakeRefused, SharedMemoryError or ProtocolError.
        """
        hello = Hello(
            0,
            PROTOCOL_VERSION,
            checkpoint.fingerprint(),
            options.dtype,
            options.partition,
            options.compress,
            sealer.weight_bits,
            sealer.weights,
        )
        link = cls(endpoint, hello, options, layouts, rooms)
        link.session = await connect_within(options.reconnect_s, partial(link._connect, None))
        return link

    async def recover(self, failed: Session, loss: GpuSideLost) -> None:
        """Replaces a failed session; the first caller does it, the others wait. Raises `loss` if it cannot."""
        if self.session is failed and not self._options.reconnect_s:
            raise loss  # `keep` may have the lock, and try for longer than anyone should wait
        async with self._recovery:
            if self.session is not failed:
                return
            failed.close()
            self.session = await connect_within(self._options.reconnect_s, partial(self._connect, failed.room))

    async def keep(self) -> None:
        """Makes a lost connection again whether or not a call waits for it, for as long as it takes. Never returns."""
        while True:
            session = self.session
            await session.connection.ended()
            async with self._recovery:
                if self.session is session:
                    session.close()
                    with contextlib.suppress(
                        Exception
                    ):  # whatever it was, other weights or too many files: it may pass
                        self.session = await self._connect(session.room)
            if self.session is session:
                await asyncio.sleep(RETRY_S)

    def close(self) -> None:
        self.session.close()

    async def _connect(self, room: Room | None) -> Session:
        """room: of the session before this one, whatever device there is now: lanes are there to stay."""
        connection = await Connection.open(Target.gpu_side(await self._endpoint()), self._most_frame_bytes(room))
        try:
            device = (await greet(connection, self._hello, "the GPU side")).device
            room = room or self._rooms(device)
            carrier = await self._carrier(connection, room)
        except BaseException:
            connection.close()
            raise
        return Session(connection, carrier, self._layouts, Plans(self._layouts, carrier.slot_bytes), device, room)

    def _most_frame_bytes(self, room: Room | None) -> int:
        """Of an honest answer, whatever device the GPU side will say it has."""
        rooms = map(self._rooms, DEVICES) if room is None else (room,)
        return min(MAX_FRAME_BYTES, max(each.slot_bytes for each in rooms) + ANSWER_BYTES)

    async def _carrier(self, connection: Connection, room: Room) -> Carrier:
        options = self._options
        if options.transport in ("auto", "shm"):
            region = await self._share(connection, room)
            if region is not None:
                return self._through(region, connection)
            if options.transport == "shm":
                raise HandshakeRefused("the GPU side does not see this machine's shared memory: use --transport auto")
        packed = options.transport == "msgpack"
        slot_bytes = min(room.slot_bytes, MAX_FRAME_BYTES - packed * ANSWER_BYTES)  # the message needs room too
        return MessageCarrier(slot_bytes, self._layouts.dtype, packed, Compression(options.compress))

    def _through(self, region: Region, connection: Connection) -> Carrier:
        if self._options.compress != "none":
            region.close()
            raise HandshakeRefused(
                f"--compress {self._options.compress} cannot help: tensors go through shared memory here; "
                "leave it out, or use --transport binary"
            )
        if self._doorbell:
            connection.use_doorbell(region, lambda: self.pace.looks)
        return SharedMemoryCarrier(region, self._doorbell)

    async def _share(self, connection: Connection, room: Room) -> Region | None:
        """A region that the other side has proved to see, or None. Its name is gone when this returns."""
        region = Region.create(self._options.shm_name, room.lanes, room.slots, room.slot_bytes)
        try:
            request = Attach(
                connection.next_call_id(), region.name, room.lanes, room.slots, room.slot_bytes, self._doorbell
            )
            answer = await connection.request(request.call_id, request, CALL_DEADLINE_S)
        except BaseException:
            region.close()
            raise
        finally:
            region.unlink()
        if isinstance(answer, Attached) and answer.nonce == region.nonce:
            return region
        region.close()
        return None
