"""A decode step's call through the project's own code: what benchmarks.rpc knows of the TEE side's inside is here."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import numpy as np

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.config import EngineOptions
from asynctsqp.layouts import Layouts
from asynctsqp.messages import Call, Done, encode
from asynctsqp.model_spec import Op
from asynctsqp.tensor_codec import WIRE_DTYPES
from tee_side.arrays import Rows
from tee_side.lanes import Lane
from tee_side.link import Link
from tee_side.meter import Meter
from tee_side.offload import Offload
from tee_side.request import RpcTotals
from tee_side.room import Room
from tee_side.seals import Clear

OP, LAYER, ROWS = Op.QKV, 0, 1
CALL_ID = 1 << 14  # as it is in the middle of an answer


@dataclass(frozen=True)
class Product:
    """One link to a GPU side, and one lane. Make it with `open` in a running loop, end it with `close`."""

    link: Link
    offload: Offload
    x: Rows  # [ROWS, hidden]

    @classmethod
    async def open(cls, model: str, endpoint: str, doorbell: str) -> Product:
        """doorbell: as the option. Tensors are in shared memory either way."""
        checkpoint = Checkpoint.find(model)
        options = EngineOptions(transport="shm", doorbell=doorbell, lanes=1, chunk_tokens=ROWS)
        layouts = Layouts(checkpoint.spec, WIRE_DTYPES[options.dtype])
        rooms = partial(Room.of, checkpoint.spec, layouts, options)

        async def address() -> str:
            return endpoint

        link = await Link.open(address, checkpoint, options, layouts, rooms, Clear())
        offload = Offload(link, Lane(0, link.session.room.slots), Clear(), RpcTotals(), None, Meter())
        return cls(link, offload, np.ones((ROWS, checkpoint.spec.hidden_size), np.float32))

    async def round_trips(self, count: int) -> list[int]:
        """Of so many calls, one after another, in ns: from the input array to the output array."""
        taken = []
        for _ in range(count):
            start = time.perf_counter_ns()
            await self.offload.linear(OP, LAYER, self.x)
            taken.append(time.perf_counter_ns() - start)
        return taken

    async def close(self) -> None:
        self.link.close()


def messages() -> tuple[bytes, bytes]:
    """A call and its answer, encoded."""
    call = Call(CALL_ID, OP, LAYER, ROWS, 0, 0, 0)
    return encode(call), encode(Done(CALL_ID, time.perf_counter(), 0.0))
