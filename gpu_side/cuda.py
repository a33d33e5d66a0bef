"""Programs on a CUDA device's streams: when each runs, and how its end is waited for.

What this relies on, beside the documentation of torch.cuda and of the CUDA runtime:

- A region that is registered with the device is page-locked memory like any other: copies from and to it are
  asynchronous, and in a graph they are nodes with fixed addresses. That torch does not own it is nothing to its
  allocator of such memory, which passes over what it does not know (ATen/core/CachingHostAllocator.h, record_event).
- Copies from memory that is not page-locked may wait for the stream, and so may stop the event loop.
- What is allocated while a graph is recorded comes out of the graph's pool and stays there, so that the addresses hold
  at each replay. A lane has a pool of its own: its graphs run one after another and may share memory, those of two
  lanes run at the same time and must not.
- A graph that is destroyed takes cuBLAS's workspace of its stream with it, which all graphs of that stream use (torch
  2.13, and pytorch's issue 193402): of lanes that share a stream only the first one has graphs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from asynctsqp.doorbell import LOOKS
from asynctsqp.errors import DeviceLost, SharedMemoryError, one_line
from asynctsqp.shm import Region
from gpu_side.executor import Program, Tensors, Times
from gpu_side.graphs import Graphs, Work
from gpu_side.streams import Streams
from gpu_side.transit import Graph, Transit

Event = torch.cuda.Event
Made = TypeVar("Made")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lane:
    """alone: no other lane had its stream when it got it."""

    stream: torch.cuda.Stream
    alone: bool
    pool: Any  # of its graphs; torch says no more of the type


class CudaExecutor:
    """One stream a lane; transfers straight from and to the client's registered region, in stream order."""

    def __init__(self, device: torch.device) -> None:
        torch.cuda.set_device(device)  # of the event loop's thread: no context on another device, by accident
        torch.set_float32_matmul_precision("highest")  # float32 means float32, whatever a container's environment says
        self.device = device
        self._polled = 0  # calls whose end the event loop looks for
        self.inline = False
        self._lanes: dict[object, Lane] = {}
        self._streams = Streams(lambda: torch.cuda.Stream(device))
        self._failed: list[torch.cuda.CUDAGraph] = []
        self._graphs = Graphs(lambda lane, work: Graph(work, self._lanes[lane].pool, self._failed))

    @property
    def looks(self) -> int:
        """One while the loop polls for a call's end: more would keep it from looking."""
        return 1 if self._polled else LOOKS

    def buffer(self, size: int) -> torch.Tensor:
        # pinned: a copy into other memory would keep the event loop until the stream has got there
        try:
            return torch.zeros(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            self._check_device(error)
            raise

    async def run(
        self,
        program: Program,
        inputs: Tensors,
        outputs: Tensors,
        short: bool,
        lane: object,
        repeats: object = None,
    ) -> Times:
        try:
            if repeats is None:  # what repeats lies in a region, which is page-locked
                inputs = tuple([await self._page_locked(tensor, short) for tensor in inputs])
            work, copied = self._queue(partial(Transit, program, inputs, outputs, self.device), short, lane, repeats)
            await self._until_over(copied, short)
        except RuntimeError as error:  # the first one may be a library's, as of cuBLAS
            self._check_device(error)
            raise
        # Back from the moment we know of: over a call's length the events' float32 milliseconds are exact enough,
        # which over hours, from an event at the start, they would not be.
        began = time.perf_counter() - work.start.elapsed_time(copied) / 1e3
        return began, work.start.elapsed_time(work.end) / 1e3

    def _queue(self, make: Callable[[], Work], short: bool, lane: object, repeats: object) -> tuple[Work, Event]:
        """-> what runs, and the event that follows its last copy."""
        known = self._lane(lane)
        copied = torch.cuda.Event(enable_timing=True, blocking=not short)  # blocking: its thread sleeps
        with torch.cuda.stream(known.stream):
            work = self._graphs.queue(lane, repeats if known.alone else None, make)
            copied.record(known.stream)
        return work, copied

    async def _until_over(self, copied: Event, short: bool) -> None:
        if not short:
            await asyncio.to_thread(self._with_device, copied.synchronize)
            return
        self._polled += 1
        try:
            while not copied.query():
                await asyncio.sleep(0)
        finally:
            self._polled -= 1

    async def _page_locked(self, tensor: torch.Tensor, short: bool) -> torch.Tensor:
        if tensor.is_pinned():
            return tensor
        return tensor.pin_memory() if short else await asyncio.to_thread(self._with_device, tensor.pin_memory)

    def _with_device(self, work: Callable[[], Made]) -> Made:
        """In a thread whose device is ours: it would get a context on the first one otherwise."""
        torch.cuda.set_device(self.device)
        return work()

    def _check_device(self, cause: RuntimeError) -> None:
        """Raises DeviceLost if an error was one of those after which every call fails, until the process ends."""
        try:
            torch.cuda.current_stream(self.device).synchronize()
        except RuntimeError:
            raise DeviceLost(f"the device fails every call from here on: {one_line(cause)}") from None

    def pin(self, region: Region) -> None:
        view = region.whole()
        code = int(torch.cuda.cudart().cudaHostRegister(view.data_ptr(), view.nbytes, 0))
        if code:
            self._clear_last_error()
            raise SharedMemoryError(f"the device cannot use the region: {torch.cuda.CudaError(code)}")

    def unpin(self, region: Region) -> None:
        code = int(torch.cuda.cudart().cudaHostUnregister(region.whole().data_ptr()))
        if code:
            self._clear_last_error()
            log.warning("a region stays registered with the device: %s", torch.cuda.CudaError(code))

    def forget(self, lanes: list[object]) -> None:
        for lane in lanes:
            known = self._lanes.pop(lane, None)
            if known is not None:
                self._give_back(lane, known)

    def _lane(self, lane: object) -> Lane:
        if lane not in self._lanes:
            self._lanes[lane] = Lane(*self._streams.take(), torch.cuda.graph_pool_handle())
        return self._lanes[lane]

    def _give_back(self, lane: object, known: Lane) -> None:
        try:
            known.stream.synchronize()  # a cancelled call may still be on its way
            self._graphs.forget(lane)
        except RuntimeError as error:  # the others are to be given back, too
            log.warning("a lane was not given back to the device: %s", one_line(error))
        self._streams.give_back(known.stream)

    def _clear_last_error(self) -> None:
        """CUDA keeps a failed call's code for whoever asks next, and torch asks after each kernel's launch.

        It has no other way to ask. So a kernel of ours gets the error, and not somebody's product.
        """
        with contextlib.suppress(RuntimeError):
            torch.empty(1, device=self.device).fill_(1)
