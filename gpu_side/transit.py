"""What a call puts on a CUDA stream, as it is or recorded.

What this relies on, beside the documentation of torch.cuda and of the CUDA runtime:

- An event made with external=True can be read after each replay of the graph that it was recorded in (pytorch's
  test_graph_timing).
- `torch.cuda.graph` is not used: it waits for the whole device and collects garbage before each recording, which would
  stop the event loop for as long as another lane's prompt takes. Garbage is not collected while a graph is recorded:
  what is freed then may do things to the device that must not be part of it.
- A recording that failed must not be destroyed: that would take cuBLAS's workspace of the stream with it (pytorch's
  issue 193402), which the lane's other graphs use; and the allocator may believe that it goes on, and look for it at
  its address (pytorch's pull request 180395).
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import torch

from gpu_side.executor import Program, Tensors
from gpu_side.graphs import Work


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

    def __init__(self, work: Work, pool: Any, failed: list[torch.cuda.CUDAGraph]) -> None:
        """Records on the current stream, which is a lane's own.

        failed: where a graph stays that could not be recorded, for ever. Raises RuntimeError for one.
        """
        self._work = work  # holds what the addresses in the graph belong to
        self.start, self.end = work.start, work.end
        self._graph = torch.cuda.CUDAGraph()
        try:
            with _no_garbage_collection():
                # thread_local: other threads load weights and wait for events meanwhile, and may
                self._graph.capture_begin(pool, capture_error_mode="thread_local")
                try:
                    work.queue()
                finally:
                    self._graph.capture_end()
        except BaseException:
            failed.append(self._graph)
            raise

    def queue(self) -> None:
        self._graph.replay()

    def destroy(self) -> None:
        self._graph.reset()


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
