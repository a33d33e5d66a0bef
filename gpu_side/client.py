"""What the GPU side keeps for one TEE side: its settings and its mapped region. No state of its inference."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from asynctsqp.compression import Compression
from asynctsqp.doorbell import Doorbell, Ring
from asynctsqp.errors import BadInputError, CallRefused, ProtocolError
from asynctsqp.layouts import OPERATIONS, Layout, Layouts, tensors_in
from asynctsqp.limits import DECODE_ROWS, MAX_FRAME_BYTES, MAX_LANES
from asynctsqp.messages import Attach, Attached, Call, Done, Hello
from asynctsqp.model_spec import ModelSpec, Op
from asynctsqp.shm import Region, SlotTensors
from asynctsqp.tensor_codec import bytes_of, wire_dtype, writable
from gpu_side.executor import DECODE_KEYS, Executor, Program, Tensors, short_rows
from gpu_side.programs import Programs, check_tokens

MOST_KEPT = 8192  # calls of one client that are remembered; a token of a 32-layer model on two slots has 258
MOST_COPIES = 4  # calls whose tensors came in messages, and are in this process's own memory at once
MOST_UNREAD_BYTES = 256 << 20  # of answers in messages that wait for their client to read them: one of the largest
UNREAD_LOOK_S = 0.01

Prepared = tuple[Program, Tensors, Tensors, bool, object, object]  # what Executor.run takes


class Client:
    """One greeted TEE side. Every number in its messages is checked before it is used."""

    def __init__(
        self,
        hello: Hello,
        spec: ModelSpec,
        programs: Programs,
        executor: Executor,
        wake: Callable[[], None],
        unread: Callable[[], int],
    ) -> None:
        """unread: bytes of answers that are on their way."""
        self._spec = spec
        self._layouts = Layouts(spec, wire_dtype(hello.dtype, hello.weight_bits))
        self._operations = OPERATIONS[hello.partition]
        self._programs = programs
        self._compression = Compression(hello.compress)
        self._copies = asyncio.Semaphore(MOST_COPIES)
        self._executor = executor
        self._region: Region | None = None
        self._wake = wake
        self._unread = unread
        self._kept: dict[tuple[int, ...], Prepared] = {}
        self._short_rows = short_rows(spec)
        self.doorbell: Doorbell | None = None
        self.listener: asyncio.Task[None] | None = None
        self.calls: set[asyncio.Task[None]] = set()

    def attach(self, request: Attach) -> Attached:
        """Maps the client's region. Raises SharedMemoryError where it cannot be."""
        if self._region is not None:
            raise BadInputError("a connection has one region, and it is attached already")
        region = Region.attach(request.name, request.lanes, request.slots, request.slot_bytes)
        try:
            self._executor.pin(region)
        except BaseException:
            region.close()
            raise
        self._region = region
        if request.doorbell:
            incoming, outgoing = Ring(region.call_ring()), Ring(region.answer_ring())
            self.doorbell = Doorbell(outgoing, incoming, self._wake, lambda: self._executor.looks)
        return Attached(request.call_id, region.nonce)

    def is_short(self, call: Call) -> bool:
        """Whether the event loop may wait for a call, which is yet to be checked."""
        return call.rows <= self._short_rows.get(call.op, 0) and call.keys <= DECODE_KEYS

    async def serve(self, call: Call, frame: memoryview | None) -> tuple[Done, memoryview | bytes | None]:
        """Runs one call, on shared memory or on the tensors that came with it. Raises CallRefused."""
        payload = frame if call.tensors is None else call.tensors
        if payload is None:
            known = self._known(call)
            return Done(call.call_id, *await self._executor.run(*known)), None
        op, layout = self._checked(call)
        if layout.slot_bytes > MAX_FRAME_BYTES:  # a small payload may claim to be a large one, compressed
            raise CallRefused("the call or its answer would be larger than a message may be")
        async with self._copies:
            await self._until_read()
            inputs = tensors_in(await self._unpacked(payload, layout.input_bytes), layout.inputs)
            answer = bytes_of(self._executor.buffer(layout.output_bytes))
            outputs = tensors_in(answer, layout.outputs)
            times = await self._executor.run(*self._prepared(call, op, inputs, outputs, repeats=None))
            packed = await self._packed(answer)
        if call.tensors is None:
            return Done(call.call_id, *times), packed
        return Done(call.call_id, *times, tensors=bytes(packed)), None

    async def close(self) -> None:
        """Waits for running calls, then unmaps: nothing of the client is left."""
        while self.calls:
            await asyncio.wait(self.calls)
        if self.listener is not None:
            self.listener.cancel()
            await asyncio.gather(self.listener, return_exceptions=True)
        if self.doorbell is not None:
            self.doorbell.close()
        region = self._region
        self._kept.clear()
        try:
            self._executor.forget([(self, lane) for lane in range(MAX_LANES)])
        finally:
            if region is not None:
                try:
                    self._executor.unpin(region)
                finally:
                    region.close()

    def _checked(self, call: Call) -> tuple[Op, Layout]:
        try:
            op = Op(call.op)
        except ValueError:
            raise CallRefused("there is no such operation") from None
        if op not in self._operations:
            raise CallRefused(f"the partition that was agreed on has no {op.name}")
        if not 0 <= call.lane < MAX_LANES:
            raise CallRefused("there is no such lane")
        if not 0 <= call.layer < self._spec.layers_of(op):
            raise CallRefused("there is no such layer")
        try:
            return op, self._layouts.of(op, call.rows, call.keys)
        except ValueError:
            raise CallRefused("there is no such call: it has at least one row, and keys if it is attention") from None

    def _in_region(self, call: Call, layout: Layout) -> SlotTensors:
        region = self._region
        if region is None:
            raise CallRefused("no tensor came with the call, and no region is attached")
        if not (0 <= call.lane < region.lanes and 0 <= call.slot < region.slots):
            raise CallRefused("there is no such lane or slot")
        if layout.slot_bytes > region.slot_bytes:
            raise CallRefused("the call does not fit its slot")
        return region.tensors(call.lane, call.slot, layout)

    def _known(self, call: Call) -> Prepared:
        """A call on the region. One of a decode step comes again, with its tensors at the same place: it is kept."""
        key = (call.op, call.layer, call.rows, call.keys, call.lane, call.slot)
        if key in self._kept:
            return self._kept[key]
        op, layout = self._checked(call)
        inputs, outputs = self._in_region(call, layout)
        # of EMBEDDING the token ids are looked at anew each time
        if not layout.reused or op is Op.EMBEDDING:
            return self._prepared(call, op, inputs, outputs, repeats=None)
        if len(self._kept) == MOST_KEPT:
            self._kept.clear()  # what still comes is back within a token
        repeats = key if call.rows <= DECODE_ROWS else None  # what is recorded of it has less room
        prepared = self._kept[key] = self._prepared(call, op, inputs, outputs, repeats)
        return prepared

    def _prepared(self, call: Call, op: Op, inputs: Tensors, outputs: Tensors, repeats: object) -> Prepared:
        if op is Op.EMBEDDING:
            inputs = (check_tokens(inputs[0], self._spec.vocab_size),)
        program = self._programs.of(op, call.layer)
        return program, inputs, outputs, self.is_short(call), (self, call.lane), repeats

    async def _until_read(self) -> None:
        """Whoever does not read what it asked for gets no more of it computed, and waits for nobody but itself."""
        while self._unread() > MOST_UNREAD_BYTES:
            await asyncio.sleep(UNREAD_LOOK_S)

    async def _unpacked(self, payload: memoryview | bytes, size: int) -> memoryview:
        view = memoryview(payload)
        try:
            if len(view) != size:  # compressed, or wrong: long either way, and no work for the event loop
                view = await asyncio.to_thread(self._compression.unpack, view, size, self._layouts.dtype.itemsize)
        except ProtocolError as error:
            raise CallRefused(f"the payload's size does not fit the call: {error}") from None
        return writable(view)

    async def _packed(self, payload: memoryview) -> memoryview | bytes:
        if self._compression.name == "none":
            return payload
        return await asyncio.to_thread(self._compression.pack, payload, self._layouts.dtype.itemsize)
