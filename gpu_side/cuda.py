"""Programs on a CUDA device's streams.

What this relies on, beside the documentation of torch.cuda and of the CUDA runtime:

- A region that is registered with the device is page-locked memory like any other: copies from and to it are
  asynchronous, and in a graph they are nodes with fixed addresses. That torch does not own it is nothing to its
  allocator of such memory, which passes over what it does not know (ATen/core/CachingHostAllocator.h, record_event).
- What is allocated while a graph is recorded comes out of the graph's pool and stays there, so that the addresses hold
  at each replay. A lane has a pool of its own: its graphs run one after another and may share memory, those of two
  lanes run at the same time and must not.
- An event made with external=True can be read after each replay of the graph that it was recorded in (pytorch's
  test_graph_timing).
- `torch.cuda.graph` is not used: it waits for the whole device and collects garbage before each recording, which would
  stop the event loop for as long as another lane's prompt takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from asynctsqp.doorbell import LOOKS
from asynctsqp.errors import SharedMemoryError
from asynctsqp.shm import Region
from gpu_side.executor import Program, Tensors, Times
from gpu_side.graphs import Graphs, Work

log = logging.getLogger(__name__)


class Transit:
    """One call: its tensors to the device, the program, the results back, in the order of the current stream."""

    def __init__(self, program: Program, inputs: Tensors, outputs: Tensors, device: torch.device) -> None:
        self._program = program
        self._inputs = inputs
        self._outputs = outputs
        self._device = device
        self.start = torch.cuda.Event(enable_timing=True, external=True)
        self.end = torch.cuda.Event(enable_timing=True, external=True)

    def queue(self) -> None:
        given = tuple(tensor.to(self._device, non_blocking=True) for tensor in self._inputs)
        made = tuple(torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device) for tensor in self._outputs)
        self.start.record()
        self._program(given, made)
        self.end.record()
        for tensor, result in zip(self._outputs, made, strict=True):
            tensor.copy_(result, non_blocking=True)


class Graph:
    """A call that was recorded. Its tensors must stay where they are until `destroy`."""

    def __init__(self, work: Work, pool: Any) -> None:
        """Records on the current stream, which is a lane's own. Raises RuntimeError where that cannot be."""
        self._work = work  # holds what the addresses in the graph belong to
        self.start, self.end = work.start, work.end
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: other threads load weights and wait for events meanwhile, and may
        self._graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            work.queue()
        finally:
            self._graph.capture_end()

    def queue(self) -> None:
        self._graph.replay()

    def destroy(self) -> None:
        self._graph.reset()


@dataclass(frozen=True)
class Lane:
    """torch has 32 streams for each device; from the 33rd lane on, two share one."""

    stream: torch.cuda.Stream
    pool: Any  # of its graphs; torch says no more of the type


class CudaExecutor:
    """One stream a lane; transfers straight from and to the client's registered region, in stream order."""

    def __init__(self, device: torch.device) -> None:
        torch.cuda.set_device(device)  # of the event loop's thread: no context on another device, by accident
        self.device = device
        self._polled = 0  # calls whose end the event loop looks for
        self.inline = False
        self._lanes: dict[object, Lane] = {}
        self._graphs = Graphs(lambda lane, work: Graph(work, self._lanes[lane].pool))

    @property
    def looks(self) -> int:
        """One while the loop polls for a call's end: more would keep it from looking."""
        return 1 if self._polled else LOOKS

    def buffer(self, size: int) -> torch.Tensor:
        # pinned: a copy into other memory would keep the event loop until the stream has got there
        return torch.zeros(size, dtype=torch.uint8, pin_memory=True)

    async def run(
        self,
        program: Program,
        inputs: Tensors,
        outputs: Tensors,
        short: bool,
        lane: object,
        repeats: object = None,
    ) -> Times:
        stream = self._lane(lane).stream
        copied = torch.cuda.Event(enable_timing=True, blocking=not short)  # blocking: its thread sleeps
        with torch.cuda.stream(stream):
            work = self._graphs.find(lane, repeats, partial(Transit, program, inputs, outputs, self.device))
            work.queue()
            copied.record(stream)
        if short:
            self._polled += 1
            try:
                while not copied.query():
                    await asyncio.sleep(0)
            finally:
                self._polled -= 1
        else:
            await asyncio.to_thread(copied.synchronize)
        # Back from the moment we know of: over a call's length the events' float32 milliseconds are exact enough,
        # which over hours, from an event at the start, they would not be.
        began = time.perf_counter() - work.start.elapsed_time(copied) / 1e3
        return began, work.start.elapsed_time(work.end) / 1e3

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
                known.stream.synchronize()  # a cancelled call may still be on its way
                self._graphs.forget(lane)

    def _lane(self, lane: object) -> Lane:
        if lane not in self._lanes:
            self._lanes[lane] = Lane(torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle())
        return self._lanes[lane]

    def _clear_last_error(self) -> None:
        """CUDA keeps a failed call's code for whoever asks next, and torch asks after each kernel's launch.

        It has no other way to ask. So a kernel of ours gets the error, and not somebody's product.
        """
        with contextlib.suppress(RuntimeError):
            torch.empty(1, device=self.device).fill_(1)
