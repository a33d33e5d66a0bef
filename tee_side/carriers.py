"""The two ways a tensor gets to the GPU side and back: through a slot of shared memory, or as a message frame.

Both give out no view of memory that the other side can reach: `take` copies and casts into private memory in
one pass, and sizes come from the caller's own table.
"""

from __future__ import annotations

from typing import Protocol

import torch

from asynctsqp.errors import ProtocolError
from asynctsqp.shm import Region
from asynctsqp.tensor_codec import bytes_of, view_of


class Carrier(Protocol):
    """Moves one block of a call. Shapes: x [rows, in_features] float32, out [rows, out_features] float32."""

    slot_bytes: int

    def put(self, lane: int, slot: int, x: torch.Tensor) -> tuple[memoryview, ...]:
        """Casts x to where it travels from; returns the frames that must go with the call."""

    def take(self, lane: int, slot: int, payload: memoryview | None, out: torch.Tensor) -> None:
        """Copies and casts the answer into `out`. Raises ProtocolError if it has another size."""

    def close(self) -> None:
        """Gives the memory back."""


class SharedMemoryCarrier:
    """Slots of a region."""

    def __init__(self, region: Region, dtype: torch.dtype) -> None:
        self._region = region
        self._dtype = dtype
        self.slot_bytes = region.slot_bytes

    def put(self, lane: int, slot: int, x: torch.Tensor) -> tuple[memoryview, ...]:
        self._region.request(lane, slot, self._dtype, *x.shape).copy_(x)
        return ()

    def take(self, lane: int, slot: int, payload: memoryview | None, out: torch.Tensor) -> None:
        if payload is not None:
            raise ProtocolError("the GPU side sent a tensor that it should have put into shared memory")
        out.copy_(self._region.reply(lane, slot, self._dtype, *out.shape))

    def close(self) -> None:
        self._region.close()


class FrameCarrier:
    """Raw bytes beside the control message, for a GPU side that shares no memory with us."""

    def __init__(self, slot_bytes: int, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self.slot_bytes = slot_bytes

    def put(self, lane: int, slot: int, x: torch.Tensor) -> tuple[memoryview, ...]:
        # a copy of its own: ZeroMQ's I/O thread reads it after this returns
        return (bytes_of(x.to(self._dtype, copy=True, memory_format=torch.contiguous_format)),)

    def take(self, lane: int, slot: int, payload: memoryview | None, out: torch.Tensor) -> None:
        if payload is None or len(payload) != out.numel() * self._dtype.itemsize:
            raise ProtocolError("the GPU side answered with a tensor of another size")
        out.copy_(view_of(payload, self._dtype, *out.shape))

    def close(self) -> None:
        pass
