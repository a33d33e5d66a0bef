"""Where and how a program runs: on CPU threads, or on CUDA streams.

An executor takes tensors that lie in the client's memory (shared, or a received message) and writes the
result into the client's memory. It never blocks the event loop for longer than a decode-sized product.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch

from asynctsqp.errors import BadInputError
from asynctsqp.shm import Region

DECODE_ROWS = 16  # up to here a product is bound by reading the weights, and shorter than a hop between threads
DECODE_KEYS = 4096  # and so is attention to so many keys

Tensors = tuple[torch.Tensor, ...]
Program = Callable[[Tensors, Tensors], None]  # computes the outputs, which are there already, from the inputs
Times = tuple[float, float]  # when a computation began, by time.perf_counter, and how many seconds it took


class Executor(Protocol):
    """One device."""

    device: torch.device
    busy: int  # products that are computed now, by threads that need the cores which a polling loop would take

    inline: bool  # `run` computes what is short there and then, so that a task for it is waste

    def buffer(self, size: int) -> torch.Tensor:
        """`size` bytes of host memory that results can be copied to, zeroed: no call's leftovers in another's gaps."""

    async def run(self, program: Program, inputs: Tensors, outputs: Tensors, short: bool, lane: object) -> Times:
        """Runs a program on tensors in host memory. Calls of one lane run in order. short: as `is_short` says."""

    def pin(self, region: Region) -> None:
        """Prepares a client's region for transfers."""

    def unpin(self, region: Region) -> None:
        """Undoes `pin`."""

    def forget(self, lanes: list[object]) -> None:
        """Drops what was kept for a client's lanes, when nothing runs on them any more."""


class CpuExecutor:
    """Decode-sized products inline, longer ones one after another in one thread (torch itself uses more)."""

    def __init__(self, threads: int) -> None:
        self.device = torch.device("cpu")
        self.busy = 0
        # OpenMP counts its threads for each thread that uses them by itself
        self._thread = ThreadPoolExecutor(1, "product", torch.set_num_threads, (threads,))
        self.inline = True

    def buffer(self, size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.uint8)

    async def run(self, program: Program, inputs: Tensors, outputs: Tensors, short: bool, lane: object) -> Times:
        if short:
            return _timed(program, inputs, outputs)
        self.busy += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, _timed, program, inputs, outputs)
        finally:
            self.busy -= 1

    def pin(self, region: Region) -> None:
        pass

    def unpin(self, region: Region) -> None:
        pass

    def forget(self, lanes: list[object]) -> None:
        pass


class CudaExecutor:
    """One stream a lane; transfers straight from and to the client's registered region, in stream order."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.busy = 0
        self._streams: dict[object, torch.cuda.Stream] = {}
        self._clock = _reference(device)
        self.inline = False

    def buffer(self, size: int) -> torch.Tensor:
        # pinned: a copy into other memory would keep the event loop until the stream has got there
        return torch.zeros(size, dtype=torch.uint8, pin_memory=True)

    async def run(self, program: Program, inputs: Tensors, outputs: Tensors, short: bool, lane: object) -> Times:
        stream = self._stream(lane)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(stream):
            given = tuple(tensor.to(self.device, non_blocking=True) for tensor in inputs)
            made = tuple(torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device) for tensor in outputs)
            start.record(stream)
            program(given, made)
            end.record(stream)
            for tensor, result in zip(outputs, made, strict=True):
                tensor.copy_(result, non_blocking=True)
            copied = stream.record_event()
        if short:
            while not copied.query():
                await asyncio.sleep(0)
        else:
            await asyncio.to_thread(copied.synchronize)
        reference, its_time = self._clock
        return its_time + float(reference.elapsed_time(start)) / 1e3, float(start.elapsed_time(end)) / 1e3

    def _stream(self, lane: object) -> torch.cuda.Stream:
        if lane not in self._streams:
            self._streams[lane] = torch.cuda.Stream(self.device)
        return self._streams[lane]

    def pin(self, region: Region) -> None:
        view = region.whole()
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(view.data_ptr(), view.nbytes, 0))

    def forget(self, lanes: list[object]) -> None:
        for lane in lanes:
            stream = self._streams.pop(lane, None)
            if stream is not None:
                stream.synchronize()  # a cancelled call's copy may still be on its way

    def unpin(self, region: Region) -> None:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(region.whole().data_ptr()))


def is_short(rows: int, keys: int) -> bool:
    """Whether a call of this size is a decode step's."""
    return rows <= DECODE_ROWS and keys <= DECODE_KEYS


def choose(device: str, threads: int) -> Executor:
    """device: auto, cpu, cuda or cuda:N; threads: for products on the CPU.

    Raises BadInputError where there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise BadInputError(f"--device is auto, cpu or cuda[:N], not {device!r}") from None
    if chosen.type == "cpu":
        return CpuExecutor(threads)
    if chosen.type != "cuda":
        raise BadInputError(f"--device is auto, cpu or cuda[:N], not {device!r}")
    if not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count():
        raise BadInputError(f"there is no {device} here: torch sees {torch.cuda.device_count()} CUDA devices")
    return CudaExecutor(chosen)


def _timed(program: Program, inputs: Tensors, outputs: Tensors) -> Times:
    start = time.perf_counter()
    program(inputs, outputs)
    return start, time.perf_counter() - start


def _reference(device: torch.device) -> tuple[torch.cuda.Event, float]:
    """An event of the device and the host's time at which it happened: what its other events are compared with."""
    with torch.cuda.device(device):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
    return event, time.perf_counter()
