"""One linear, computed on the GPU side: cut into blocks, cast into a slot, called, copied back.

A call that is larger than a slot is cut by rows into blocks that alternate between the lane's two slots, so
that this side casts block k+1 and copies block k-1 back while the GPU side computes block k. Linears keep no
state over there: when the connection is lost, the whole linear is asked for again on the next one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from asynctsqp.errors import CallRefused, GpuSideLost, ProtocolError, one_line
from asynctsqp.limits import SLOTS
from asynctsqp.messages import Call, Done, Refused
from asynctsqp.model_spec import ModelSpec, Op
from asynctsqp.rpc import Reply
from tee_side.lanes import Lane
from tee_side.link import Link, Session
from tee_side.request import RpcTotals


@dataclass(frozen=True, slots=True)
class _Block:
    """One block on its way."""

    out: torch.Tensor  # where its answer goes: [rows, out_features] float32
    slot: int
    reply: asyncio.Future[Reply]


class Offload:
    """The GPU side as one forward pass sees it: `await gpu.linear(...)` on one lane."""

    def __init__(self, link: Link, lane: Lane, spec: ModelSpec, totals: RpcTotals) -> None:
        self._link = link
        self._lane = lane
        self._spec = spec
        self._totals = totals

    async def linear(self, op: Op, layer: int, x: torch.Tensor) -> torch.Tensor:
        """x: [rows, in_features] float32 -> [rows, out_features] float32, as partitions.Gpu says.

        Raises GpuSideLost if the GPU side is gone and cannot be reached again in time.
        """
        while True:
            session = self._link.session
            try:
                return await self._linear(session, op, layer, x)
            except GpuSideLost as loss:
                await self._link.recover(session, loss)

    async def _linear(self, session: Session, op: Op, layer: int, x: torch.Tensor) -> torch.Tensor:
        session.connection.check()
        linear = self._spec.linears[op]
        out = torch.empty(len(x), linear.out_features)
        row_bytes = session.dtype.itemsize * linear.widest
        previous: _Block | None = None
        for index, rows in enumerate(_cut(len(x), session.carrier.slot_bytes // row_bytes)):
            block = self._send(session, op, layer, x[rows], out[rows], index % SLOTS)
            if previous is not None:
                await self._receive(session, previous)
            previous = block
        if previous is not None:
            await self._receive(session, previous)
        return out

    def _send(self, session: Session, op: Op, layer: int, x: torch.Tensor, out: torch.Tensor, slot: int) -> _Block:
        frames = session.carrier.put(self._lane.index, slot, x)
        connection = session.connection
        call = Call(connection.next_call_id(), op, layer, len(x), self._lane.index, slot)
        self._lane.call_started()
        reply = connection.call(call.call_id, call, frames, settled=self._lane.call_settled)
        self._totals.calls += 1
        self._totals.bytes_sent += x.numel() * session.dtype.itemsize
        return _Block(out, slot, reply)

    async def _receive(self, session: Session, block: _Block) -> None:
        start = time.perf_counter()
        answer, payload = await block.reply
        self._totals.wait_s += time.perf_counter() - start
        if isinstance(answer, Refused):
            raise CallRefused(f"the GPU side refused a call: {one_line(answer.reason)}")
        if not isinstance(answer, Done):
            raise ProtocolError("the GPU side answered a call with another kind of message")
        session.carrier.take(self._lane.index, block.slot, payload, block.out)
        self._totals.bytes_received += block.out.numel() * session.dtype.itemsize


def _cut(rows: int, most: int) -> Iterator[slice]:
    """Blocks of nearly equal size, none above `most` rows."""
    blocks = -(-rows // most)
    size = -(-rows // blocks)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))
