"""Where and how a product runs: on CPU threads, or on CUDA streams.

An executor takes tensors that lie in the client's memory (shared, or a received message) and writes the
result into the client's memory. It never blocks the event loop for longer than a decode-sized product.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch

from asynctsqp.errors import BadInputError
from asynctsqp.shm import Region
from gpu_side.weights import Linear

DECODE_ROWS = 16  # up to here a product is bound by reading the weights, and shorter than a hop between threads


class Executor(Protocol):
    """One device."""

    device: torch.device
    busy: int  # products that are computed now, by threads that need the cores which a polling loop would take

    def inline(self, rows: int) -> bool:
        """Whether `run` computes a product of so many rows there and then, so that a task for it is waste."""

    async def run(self, linear: Linear, x: torch.Tensor, out: torch.Tensor, lane: object) -> float:
        """out = x W^T (+ bias); returns the seconds that it took. Calls of one lane run in order."""

    def pin(self, region: Region) -> None:
        """Prepares a client's region for transfers."""

    def unpin(self, region: Region, lanes: list[object]) -> None:
        """Undoes `pin`, and forgets what was kept for the client's lanes."""


class CpuExecutor:
    """Decode-sized products inline, longer ones one after another in one thread (torch itself uses more)."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.busy = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="product")

    def inline(self, rows: int) -> bool:
        return rows <= DECODE_ROWS

    async def run(self, linear: Linear, x: torch.Tensor, out: torch.Tensor, lane: object) -> float:
        if self.inline(len(x)):
            return _timed_product(linear, x, out)
        self.busy += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, _timed_product, linear, x, out)
        finally:
            self.busy -= 1

    def pin(self, region: Region) -> None:
        pass

    def unpin(self, region: Region, lanes: list[object]) -> None:
        pass


class CudaExecutor:
    """One stream a lane; transfers straight from and to the client's registered region, in stream order."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.busy = 0
        self._streams: dict[object, torch.cuda.Stream] = {}

    def inline(self, rows: int) -> bool:
        return False

    async def run(self, linear: Linear, x: torch.Tensor, out: torch.Tensor, lane: object) -> float:
        stream = self._stream(lane)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(stream):
            device_x = x.to(self.device, non_blocking=True)
            device_out = torch.empty(out.shape, dtype=out.dtype, device=self.device)
            start.record(stream)
            linear.product(device_x, device_out)
            end.record(stream)
            out.copy_(device_out, non_blocking=True)
            copied = stream.record_event()
        if len(x) <= DECODE_ROWS:
            while not copied.query():
                await asyncio.sleep(0)
        else:
            await asyncio.to_thread(copied.synchronize)
        return float(start.elapsed_time(end)) / 1e3

    def _stream(self, lane: object) -> torch.cuda.Stream:
        if lane not in self._streams:
            self._streams[lane] = torch.cuda.Stream(self.device)
        return self._streams[lane]

    def pin(self, region: Region) -> None:
        view = region.whole()
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(view.data_ptr(), view.nbytes, 0))

    def unpin(self, region: Region, lanes: list[object]) -> None:
        for lane in lanes:
            self._streams.pop(lane, None)
        torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(region.whole().data_ptr()))


def choose(device: str) -> Executor:
    """device: auto, cpu, cuda or cuda:N. Raises BadInputError where there is no such device."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise BadInputError(f"--device is auto, cpu or cuda[:N], not {device!r}") from None
    if chosen.type == "cpu":
        return CpuExecutor()
    if chosen.type != "cuda":
        raise BadInputError(f"--device is auto, cpu or cuda[:N], not {device!r}")
    if not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count():
        raise BadInputError(f"there is no {device} here: torch sees {torch.cuda.device_count()} CUDA devices")
    return CudaExecutor(chosen)


def _timed_product(linear: Linear, x: torch.Tensor, out: torch.Tensor) -> float:
    start = time.perf_counter()
    linear.product(x, out)
    return time.perf_counter() - start
