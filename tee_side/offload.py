"""One operation, computed on the GPU side: cut into blocks, cast into a slot, called, copied back.

A call that is larger than a slot is cut by rows into blocks that take turns on the lane's slots, so that this side
casts block k+1 and copies block k-1 back while the GPU side computes block k. The GPU side keeps no state: when the
connection is lost, the whole operation is asked for again on the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from asynctsqp.errors import BadInputError, CallRefused, GpuSideLost, ProtocolError, one_line
from asynctsqp.layouts import Layout, cut, most_rows, sizes
from asynctsqp.messages import Call, Done, Refused
from asynctsqp.model_spec import Op
from asynctsqp.reports.records import RpcRecord
from asynctsqp.rpc import Reply
from tee_side.lanes import Lane, Slot
from tee_side.link import Link, Session
from tee_side.request import RpcTotals

MOST_LOSSES = 5  # over one operation, while --reconnect-s makes new connections

Note = Callable[[RpcRecord], None]
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class _Block:
    """One block on its way."""

    call: Call
    layout: Layout
    outputs: Tensors  # where its answer goes, float32
    slot: Slot
    reply: asyncio.Future[Reply]
    started_at: float
    encoded_at: float
    sent_at: float


class Offload:
    """The GPU side as one forward pass sees it, on one lane: what partitions.Gpu promises.

    note: called with a record of each call, or None. A method raises GpuSideLost if the GPU side is gone and cannot
    be reached again in time, CallRefused for a call that it answers with an error.
    """

    def __init__(self, link: Link, lane: Lane, totals: RpcTotals, note: Note | None) -> None:
        self._link = link
        self._lane = lane
        self._totals = totals
        self._note = note
        self._waits = 0
        self._waiting_since = 0.0

    async def linear(self, op: Op, layer: int, x: torch.Tensor) -> torch.Tensor:
        (y,) = await self.call(op, layer, x)
        return y

    async def call(self, op: Op, layer: int, *inputs: torch.Tensor) -> Tensors:
        for _ in range(MOST_LOSSES):
            session = self._link.session
            try:
                return await self._call(session, op, layer, inputs)
            except GpuSideLost as loss:
                await self._link.recover(session, loss)
        raise GpuSideLost(f"the GPU side was lost {MOST_LOSSES} times over the same call: something in it ends it")

    async def _call(self, session: Session, op: Op, layer: int, inputs: Tensors) -> Tensors:
        session.connection.check()
        rows, keys = sizes(op, inputs)
        layout_of = partial(session.layouts.of, op, keys=keys)
        whole = layout_of(rows)
        outputs = tuple(torch.empty(area.shape) for area in whole.outputs)
        on_their_way: deque[_Block] = deque()
        try:
            for part in _cut(rows, most_rows(layout_of, session.carrier.slot_bytes, rows)):
                if on_their_way and not self._lane.has_free_slot:
                    await self._receive(session, on_their_way.popleft())
                slot = await self._lane.slot()
                call_id, count = session.connection.next_call_id(), part.stop - part.start
                call = Call(call_id, op, layer, count, keys, self._lane.index, slot.index)
                given, wanted = cut(whole.inputs, inputs, part), cut(whole.outputs, outputs, part)
                on_their_way.append(self._send(session, call, layout_of(call.rows), slot, given, wanted))
            while on_their_way:
                await self._receive(session, on_their_way.popleft())
        finally:
            for block in on_their_way:
                block.slot.release()
        return outputs

    def _send(
        self, session: Session, call: Call, layout: Layout, slot: Slot, inputs: Tensors, outputs: Tensors
    ) -> _Block:
        started_at = time.perf_counter()
        try:
            session.connection.check()  # it may have been lost, and its memory given back, while we waited for the slot
            message, frames = session.carrier.put(call, layout, inputs)
            encoded_at = time.perf_counter()
            slot.lend()
            reply = session.connection.call(call.call_id, message, frames, settled=slot.settle)
        except BaseException:
            slot.release()
            raise
        self._totals.calls += 1
        self._totals.bytes_sent += layout.input_bytes
        return _Block(call, layout, outputs, slot, reply, started_at, encoded_at, time.perf_counter())

    async def _receive(self, session: Session, block: _Block) -> None:
        try:
            with self._waiting():
                answer, frame, read_at = await block.reply
            received_at = time.perf_counter()
            if isinstance(answer, Refused):
                raise CallRefused(f"the GPU side refused a call: {one_line(answer.reason)}")
            if not isinstance(answer, Done):
                raise ProtocolError("the GPU side answered a call with another kind of message")
            session.carrier.take(block.call, block.layout, answer, frame, block.outputs)
        finally:
            block.slot.release()
        self._totals.bytes_received += block.layout.output_bytes
        if self._note is not None:
            self._note(_record(block, session.carrier.transport, answer, read_at, received_at))

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """Counts the time in which any call of this pass is waited for, once."""
        if self._waits == 0:
            self._waiting_since = time.perf_counter()
        self._waits += 1
        try:
            yield
        finally:
            self._waits -= 1
            if self._waits == 0:
                self._totals.wait_s += time.perf_counter() - self._waiting_since


def _record(block: _Block, transport: str, answer: Done, read_at: float, received_at: float) -> RpcRecord:
    return RpcRecord(
        method=Op(block.call.op).name,
        layer=block.call.layer,
        lane=block.call.lane,
        slot=block.call.slot,
        transport=transport,
        bytes_sent=block.layout.input_bytes,
        bytes_received=block.layout.output_bytes,
        start_at=block.started_at,
        encode_s=block.encoded_at - block.started_at,
        send_s=block.sent_at - block.encoded_at,
        wait_s=read_at - block.sent_at,
        receive_s=received_at - read_at,
        decode_s=time.perf_counter() - received_at,
        gpu_start_at=_claimed(answer.started_at),
        gpu_s=_claimed(answer.compute_s),
    )


def _claimed(seconds: float) -> float:
    """A time that the GPU side says: any number may come."""
    return seconds if math.isfinite(seconds) and seconds >= 0 else 0.0


def _cut(rows: int, most: int) -> Iterator[slice]:
    """Blocks of nearly equal size, none above `most` rows."""
    if most == 0:
        raise BadInputError("one row of a call does not fit a slot: use a larger --slot-bytes, or fewer tokens")
    blocks = -(-rows // most)
    size = -(-rows // blocks)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))
