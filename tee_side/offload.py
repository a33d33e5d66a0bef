"""One operation, computed on the GPU side: cut into blocks, sealed, put into a slot, called, copied back, opened.

A call that is larger than a slot is cut by rows into blocks that take turns on the lane's slots, so that this side
casts block k+1 and copies block k-1 back while the GPU side computes block k. The GPU side keeps no state: when the
connection is lost, the whole operation is asked for again on the next one.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

from asynctsqp.errors import CallRefused, GpuSideLost, ProtocolError, one_line
from asynctsqp.messages import Call, Done, Refused
from asynctsqp.model_spec import Op
from asynctsqp.reports.records import RpcRecord
from asynctsqp.rpc import Connection, Reply
from tee_side.arrays import Array, Rows
from tee_side.lanes import Lane
from tee_side.link import Link, Session
from tee_side.meter import Meter
from tee_side.plans import Block, Plan, cut
from tee_side.request import RpcTotals
from tee_side.seals import Sealer

MOST_LOSSES = 5  # over one operation, while --reconnect-s makes new connections

Note = Callable[[RpcRecord], None]
Inputs = tuple[Array, ...]
Outputs = tuple[Rows, ...]


class Offload:
    """The GPU side as one forward pass sees it, on one lane: what partitions.Gpu promises.

    sealer: what becomes of the data on the way.
    note: called with a record of each call, or None. A method raises GpuSideLost if the GPU side is gone and cannot
    be reached again in time, CallRefused for a call that it answers with an error.
    """

    def __init__(
        self, link: Link, lane: Lane, sealer: Sealer, totals: RpcTotals, note: Note | None, meter: Meter
    ) -> None:
        self._link = link
        self._lane = lane
        self._sealer = sealer
        self._totals = totals
        self._note = note
        self._meter = meter
        self._waits = 0  # calls that are waited for
        self._waiting_since = 0.0

    async def linear(self, op: Op, layer: int, x: Array) -> Rows:
        (y,) = await self.call(op, layer, x)
        return y

    async def call(self, op: Op, layer: int, *inputs: Array) -> Outputs:
        for _ in range(MOST_LOSSES):
            session = self._link.session
            try:
                session.connection.check()
                return await self._call(session, op, layer, inputs)
            except GpuSideLost as loss:
                await self._link.recover(session, loss)
        raise GpuSideLost(f"the GPU side was lost {MOST_LOSSES} times over the same call: something in it ends it")

    async def _call(self, session: Session, op: Op, layer: int, inputs: Inputs) -> Outputs:
        plan = session.plans.of(op, inputs)
        outputs = plan.outputs()
        if len(plan.blocks) == 1:
            await self._exchange(session, op, layer, plan.keys, plan.blocks[0], inputs, outputs)
        else:
            await self._exchange_all(session, op, layer, plan, inputs, outputs)
        return outputs

    async def _exchange_all(
        self, session: Session, op: Op, layer: int, plan: Plan, inputs: Inputs, outputs: Outputs
    ) -> None:
        """All blocks, as many at a time as the lane has slots."""
        tasks = []
        for block in plan.blocks:
            given, wanted = cut(plan.whole.inputs, inputs, block.part), cut(plan.whole.outputs, outputs, block.part)
            exchange = self._exchange(session, op, layer, plan.keys, block, given, wanted)
            tasks.append(asyncio.create_task(exchange))
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _exchange(
        self, session: Session, op: Op, layer: int, keys: int, block: Block, inputs: Inputs, outputs: Outputs
    ) -> None:
        """One block: through a slot to the GPU side and back."""
        slot = await self._lane.slot()
        try:
            started_at = time.perf_counter()
            sealed = await self._sealer.seal(op, layer, inputs, outputs)
            connection, carrier = session.connection, session.carrier
            connection.check()  # it may have been lost, and its memory given back, while we waited for slot or masks
            call = Call(connection.next_call_id(), op, layer, block.rows, keys, self._lane.index, slot.index)
            message, frames = carrier.put(call, block.layout, sealed.inputs)
            encoded_at = time.perf_counter()
            slot.lend()
            reply = connection.call(call.call_id, message, frames, settled=slot.settle)
            sent_at = time.perf_counter()
            sealed.sent()
            self._totals.calls += 1
            self._totals.bytes_sent += block.layout.input_bytes
            answer, frame, read_at = await self._answer(connection, reply, sent_at)
            received_at = time.perf_counter()
            self._meter.called(read_at - sent_at)
            if isinstance(answer, Refused):
                raise CallRefused(f"the GPU side refused a call: {one_line(answer.reason)}")
            if not isinstance(answer, Done):
                raise ProtocolError("the GPU side answered a call with another kind of message")
            connection.check()  # another lane may have seen it lost, and given its memory back, since the answer came
            carrier.take(call, block.layout, answer, frame, sealed.room)
        finally:
            slot.release()
        sealed.open()
        self._totals.bytes_received += block.layout.output_bytes
        if self._note is not None:
            self._note(
                RpcRecord(
                    method=op.name,
                    layer=layer,
                    lane=call.lane,
                    slot=call.slot,
                    transport=carrier.transport,
                    bytes_sent=block.layout.input_bytes,
                    bytes_received=block.layout.output_bytes,
                    start_at=started_at,
                    encode_s=encoded_at - started_at,
                    send_s=sent_at - encoded_at,
                    wait_s=read_at - sent_at,
                    receive_s=received_at - read_at,
                    decode_s=time.perf_counter() - received_at,
                    gpu_start_at=_claimed(answer.started_at),
                    gpu_s=_claimed(answer.compute_s),
                )
            )

    async def _answer(self, connection: Connection, reply: asyncio.Future[Reply], now: float) -> Reply:
        """Waits, and counts the time in which any call of this pass is waited for, once."""
        if self._waits == 0:
            self._waiting_since = now
        self._waits += 1
        try:
            return await connection.answer(reply)
        finally:
            self._waits -= 1
            if self._waits == 0:
                self._totals.wait_s += time.perf_counter() - self._waiting_since


def _claimed(seconds: float) -> float:
    """A time that the GPU side says: any number may come."""
    return seconds if math.isfinite(seconds) and seconds >= 0 else 0.0
