"""What the GPU side keeps for one TEE side: its settings and its mapped region. No state of its inference."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import torch

from asynctsqp.doorbell import Doorbell, Ring
from asynctsqp.errors import BadInputError, CallRefused
from asynctsqp.limits import MAX_FRAME_BYTES, SLOTS
from asynctsqp.messages import Attach, Attached, Call, Done, Hello
from asynctsqp.model_spec import LinearSpec, ModelSpec, Op
from asynctsqp.shm import Region
from asynctsqp.tensor_codec import WIRE_DTYPES, bytes_of, view_of
from gpu_side.executor import Executor
from gpu_side.weights import Weights

MAX_CALLS = 256  # in flight; an honest client has two a lane


class Client:
    """One greeted TEE side. Every number in its messages is checked before it is used."""

    def __init__(
        self, hello: Hello, spec: ModelSpec, weights: Weights, executor: Executor, wake: Callable[[], None]
    ) -> None:
        self._dtype = WIRE_DTYPES[hello.dtype]
        self._spec = spec
        self._weights = weights
        self._executor = executor
        self._region: Region | None = None
        self._wake = wake
        self.doorbell: Doorbell | None = None
        self.listener: asyncio.Task[None] | None = None
        self.calls: set[asyncio.Task[None]] = set()

    def attach(self, request: Attach) -> Attached:
        """Maps the client's region. Raises SharedMemoryError where it cannot be."""
        if self._region is not None:
            raise BadInputError("a connection has one region, and it is attached already")
        region = Region.attach(request.name, request.lanes, request.slot_bytes)
        self._executor.pin(region)
        self._region = region
        if request.doorbell:
            incoming, outgoing = Ring(region.call_ring()), Ring(region.answer_ring())
            self.doorbell = Doorbell(outgoing, incoming, self._wake, lambda: not self._executor.busy)
        return Attached(request.call_id, region.nonce)

    async def serve(self, call: Call, payload: memoryview | None) -> tuple[Done, memoryview | None]:
        """Runs one call, on shared memory or on the payload that came with it. Raises CallRefused."""
        linear = self._linear(call)
        weights = self._weights.linear(Op(call.op), call.layer)
        if payload is None:
            x, out = self._views(call, linear)
            compute_s = await self._executor.run(weights, x, out, (self, call.lane))
            return Done(call.call_id, compute_s), None
        if len(payload) != call.rows * linear.in_features * self._dtype.itemsize:
            raise CallRefused("the payload's size does not fit the call")
        if call.rows * linear.out_features * self._dtype.itemsize > MAX_FRAME_BYTES:
            raise CallRefused("the answer would be larger than a message may be")
        x = view_of(payload, self._dtype, call.rows, linear.in_features)
        out = torch.empty(call.rows, linear.out_features, dtype=self._dtype)
        compute_s = await self._executor.run(weights, x, out, (self, call.lane))
        return Done(call.call_id, compute_s), bytes_of(out)

    async def close(self) -> None:
        """Waits for running calls, then unmaps: nothing of the client is left."""
        while self.calls:
            await asyncio.wait(self.calls)
        if self.listener is not None:
            self.listener.cancel()
            await asyncio.gather(self.listener, return_exceptions=True)
        if self.doorbell is not None:
            self.doorbell.close()
        if self._region is not None:
            lanes: list[object] = [(self, lane) for lane in range(self._region.lanes)]
            self._executor.unpin(self._region, lanes)
            self._region.close()

    def _linear(self, call: Call) -> LinearSpec:
        try:
            op = Op(call.op)
        except ValueError:
            raise CallRefused("there is no such operation") from None
        if not 0 <= call.layer < self._spec.layers_of(op):
            raise CallRefused("there is no such layer")
        if call.rows < 1:
            raise CallRefused("a call has at least one row")
        return self._spec.linears[op]

    def _views(self, call: Call, linear: LinearSpec) -> tuple[torch.Tensor, torch.Tensor]:
        region = self._region
        if region is None:
            raise CallRefused("no tensor came with the call, and no region is attached")
        if not (0 <= call.lane < region.lanes and 0 <= call.slot < SLOTS):
            raise CallRefused("there is no such lane or slot")
        if call.rows * linear.widest * self._dtype.itemsize > region.slot_bytes:
            raise CallRefused("the call does not fit its slot")
        x = region.request(call.lane, call.slot, self._dtype, call.rows, linear.in_features)
        return x, region.reply(call.lane, call.slot, self._dtype, call.rows, linear.out_features)
