"""The ways tensors get to the GPU side and back: through a slot of shared memory, or in a message.

None gives out a view of memory that the other side can reach: `take` copies and casts into private memory in one
pass, and sizes come from the caller's own table (asynctsqp/layouts.py).
"""

from __future__ import annotations

from typing import Protocol

import msgspec
import torch

from asynctsqp.compression import Compression
from asynctsqp.errors import ProtocolError
from asynctsqp.layouts import Layout
from asynctsqp.messages import Call, Done
from asynctsqp.shm import Region
from asynctsqp.tensor_codec import writable
from tee_side.arrays import Array
from tee_side.places import Places, places_in, shared_places_in

MOST_KEPT = 4096  # places of calls that are remembered, a kilobyte or two each; a decode step on one slot has five

Frames = tuple[memoryview | bytes, ...]
Arrays = tuple[Array, ...]


class Carrier(Protocol):
    """Moves the tensors of one block of a call."""

    transport: str  # as records.RpcRecord names it
    slot_bytes: int

    def put(self, call: Call, layout: Layout, inputs: Arrays) -> tuple[Call, Frames]:
        """Casts inputs to where they travel from; returns what is to be sent."""

    def take(self, call: Call, layout: Layout, answer: Done, frame: memoryview | None, outputs: Arrays) -> None:
        """Copies and casts the answer into `outputs`. Raises ProtocolError if it has another size."""

    def close(self) -> None:
        """Gives the memory back."""


class SharedMemoryCarrier:
    """Slots of a region."""

    def __init__(self, region: Region, doorbell: bool) -> None:
        self._region = region
        self._kept: dict[tuple[int, int, Layout], tuple[Places, Places]] = {}
        self.transport = "doorbell" if doorbell else "shm"
        self.slot_bytes = region.slot_bytes

    def put(self, call: Call, layout: Layout, inputs: Arrays) -> tuple[Call, Frames]:
        for place, x in zip(self._places(call, layout)[0], inputs, strict=True):
            place.write(x)
        return call, ()

    def take(self, call: Call, layout: Layout, answer: Done, frame: memoryview | None, outputs: Arrays) -> None:
        if frame is not None or answer.tensors is not None:
            raise ProtocolError("the GPU side sent a tensor that it should have put into shared memory")
        for place, y in zip(self._places(call, layout)[1], outputs, strict=True):
            place.read(y)

    def close(self) -> None:
        self._kept.clear()
        self._region.close()

    def _places(self, call: Call, layout: Layout) -> tuple[Places, Places]:
        """Of the request and of its reply."""
        key = (call.lane, call.slot, layout)
        if key in self._kept:
            return self._kept[key]
        request, reply = self._region.slot(call.lane, call.slot)
        places = shared_places_in(request, layout.inputs), shared_places_in(reply, layout.outputs)
        if layout.reused:  # those of a decode step: making them takes as long as the product's call
            if len(self._kept) == MOST_KEPT:
                self._kept.clear()  # what still comes is back within a token
            self._kept[key] = places
        return places


class MessageCarrier:
    """Bytes beside the control message (binary) or inside it (msgpack), for a side that shares no memory with us."""

    def __init__(self, slot_bytes: int, dtype: torch.dtype, packed: bool, compression: Compression) -> None:
        self.transport = "msgpack" if packed else "binary"
        self.slot_bytes = slot_bytes
        self._itemsize = dtype.itemsize
        self._packed = packed
        self._compression = compression

    def put(self, call: Call, layout: Layout, inputs: Arrays) -> tuple[Call, Frames]:
        # memory of its own: ZeroMQ's I/O thread reads it after this returns
        memory = memoryview(bytearray(layout.input_bytes))  # zeroed: the gaps between tensors travel too
        for place, x in zip(places_in(memory, layout.inputs), inputs, strict=True):
            place.write(x)
        payload = self._compression.pack(memory, self._itemsize)
        if self._packed:
            return msgspec.structs.replace(call, tensors=bytes(payload)), ()
        return call, (payload,)

    def take(self, call: Call, layout: Layout, answer: Done, frame: memoryview | None, outputs: Arrays) -> None:
        payload = answer.tensors if self._packed else frame
        if payload is None or (frame is not None) == self._packed:
            raise ProtocolError("the GPU side answered without a tensor, or with one in the wrong place")
        raw = self._compression.unpack(memoryview(payload), layout.output_bytes, self._itemsize)
        for place, y in zip(places_in(writable(raw), layout.outputs), outputs, strict=True):
            place.read(y)

    def close(self) -> None:
        pass
