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
from asynctsqp.layouts import Layout, tensors_in
from asynctsqp.messages import Call, Done
from asynctsqp.shm import Region
from asynctsqp.tensor_codec import bytes_of, writable

Frames = tuple[memoryview | bytes, ...]


class Carrier(Protocol):
    """Moves the tensors of one block of a call."""

    transport: str  # as records.RpcRecord names it
    slot_bytes: int

    def put(self, call: Call, layout: Layout, inputs: tuple[torch.Tensor, ...]) -> tuple[Call, Frames]:
        """Casts float32 inputs (ids: int64) to where they travel from; returns what is to be sent."""

    def take(
        self, call: Call, layout: Layout, answer: Done, frame: memoryview | None, outputs: tuple[torch.Tensor, ...]
    ) -> None:
        """Copies and casts the answer into `outputs`, float32. Raises ProtocolError if it has another size."""

    def close(self) -> None:
        """Gives the memory back."""


class SharedMemoryCarrier:
    """Slots of a region."""

    def __init__(self, region: Region, doorbell: bool) -> None:
        self._region = region
        self.transport = "doorbell" if doorbell else "shm"
        self.slot_bytes = region.slot_bytes

    def put(self, call: Call, layout: Layout, inputs: tuple[torch.Tensor, ...]) -> tuple[Call, Frames]:
        views, _ = self._region.tensors(call.lane, call.slot, layout)
        for view, tensor in zip(views, inputs, strict=True):
            view.copy_(tensor)
        return call, ()

    def take(
        self, call: Call, layout: Layout, answer: Done, frame: memoryview | None, outputs: tuple[torch.Tensor, ...]
    ) -> None:
        if frame is not None or answer.tensors is not None:
            raise ProtocolError("the GPU side sent a tensor that it should have put into shared memory")
        _, views = self._region.tensors(call.lane, call.slot, layout)
        for view, tensor in zip(views, outputs, strict=True):
            tensor.copy_(view)

    def close(self) -> None:
        self._region.close()


class MessageCarrier:
    """Bytes beside the control message (binary) or inside it (msgpack), for a side that shares no memory with us."""

    def __init__(self, slot_bytes: int, dtype: torch.dtype, packed: bool, compression: Compression) -> None:
        self.transport = "msgpack" if packed else "binary"
        self.slot_bytes = slot_bytes
        self._itemsize = dtype.itemsize
        self._packed = packed
        self._compression = compression

    def put(self, call: Call, layout: Layout, inputs: tuple[torch.Tensor, ...]) -> tuple[Call, Frames]:
        # memory of its own: ZeroMQ's I/O thread reads it after this returns
        memory = bytes_of(torch.zeros(layout.input_bytes, dtype=torch.uint8))  # the gaps between tensors travel too
        for view, tensor in zip(tensors_in(memory, 0, layout.inputs), inputs, strict=True):
            view.copy_(tensor)
        payload = self._compression.pack(memory, self._itemsize)
        if self._packed:
            return msgspec.structs.replace(call, tensors=bytes(payload)), ()
        return call, (payload,)

    def take(
        self, call: Call, layout: Layout, answer: Done, frame: memoryview | None, outputs: tuple[torch.Tensor, ...]
    ) -> None:
        payload = answer.tensors if self._packed else frame
        if payload is None or (frame is not None) == self._packed:
            raise ProtocolError("the GPU side answered without a tensor, or with one in the wrong place")
        raw = self._compression.unpack(memoryview(payload), layout.output_bytes, self._itemsize)
        for view, tensor in zip(tensors_in(writable(raw), 0, layout.outputs), outputs, strict=True):
            tensor.copy_(view)

    def close(self) -> None:
        pass
