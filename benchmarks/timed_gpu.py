"""A GPU side that computes nothing: the project's own server, over a device of our choosing.

What a product costs on it is set, and nothing is computed in that time: the server looks for its end as for that of a
GPU's product (gpu_side/cuda.py), once a turn of its loop. It is one device: products wait for each other, whatever lane
they come from. Answers are what the slots hold, which is zeros, since nobody writes there; the weights are torch's meta
tensors, which take no memory. "meta" is also what the TEE side hears that the device is: not a CPU, so that it forms
batches as for a GPU.

Driven as a worker of benchmarks.harness. Everything that benchmarks need to know of the GPU side's inside is here.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Any

import torch
import zmq.asyncio

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.doorbell import LOOKS
from asynctsqp.loop_thread import LoopThread
from asynctsqp.shm import Region
from asynctsqp.sockets import server_socket
from benchmarks.worker import serve
from gpu_side.executor import Program, Tensors, Times
from gpu_side.server import Server


class IdleExecutor:
    """Does nothing, at once (gpu_side.executor.Executor)."""

    def __init__(self) -> None:
        self.device = torch.device("meta")
        self.inline = True
        self.calls = 0

    @property
    def looks(self) -> int:
        return LOOKS

    def buffer(self, size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.uint8)

    async def run(
        self, program: Program, inputs: Tensors, outputs: Tensors, short: bool, lane: object, repeats: object = None
    ) -> Times:
        self.calls += 1
        return time.perf_counter(), 0.0

    def pin(self, region: Region) -> None:
        pass

    def unpin(self, region: Region) -> None:
        pass

    def forget(self, lanes: list[object]) -> None:
        pass


class TimedExecutor(IdleExecutor):
    """Takes a set time for each call, and for each multiplication in it: a device that does one call after another."""

    def __init__(self) -> None:
        super().__init__()
        self.inline = False  # as on a GPU
        self._running = 0
        self._free_at = 0.0
        self.set(0.0, 0.0)

    @property
    def looks(self) -> int:
        return 1 if self._running else LOOKS

    def set(self, call_s: float, product_s: float) -> None:
        """Seconds of a call, and of a multiplication. Counts begin anew."""
        self._call_s = call_s
        self._product_s = product_s
        self.calls = 0
        self.products = 0
        self.late_s: list[float] = []

    async def run(
        self, program: Program, inputs: Tensors, outputs: Tensors, short: bool, lane: object, repeats: object = None
    ) -> Times:
        rows, in_features = inputs[0].shape
        products = rows * in_features * outputs[0].shape[1]
        self.calls += 1
        self.products += products
        seconds = self._call_s + products * self._product_s
        start = max(time.perf_counter(), self._free_at)
        if seconds:
            self._free_at = end = start + seconds
            self._running += 1
            try:
                while time.perf_counter() < end:
                    await asyncio.sleep(0)
            finally:
                self._running -= 1
            self.late_s.append(time.perf_counter() - end)
        return start, seconds


class TimedGpu:
    """The commands that benchmarks.worker runs by name."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self._runner = runner
        self._thread = LoopThread("gpu", 1)
        self._executor = IdleExecutor()
        self._serving: asyncio.Task[None] | None = None

    def serve(self, model: str, timed: bool) -> dict[str, Any]:
        """timed: whether there are times to be set. endpoint: an abstract one (Linux), no file to be left behind."""
        endpoint = f"ipc://@asynctsqp-{secrets.token_hex(8)}"
        self._runner.run(self._thread.run(self._serve(endpoint, model, timed)))
        return {"endpoint": endpoint}

    def set(self, call_s: float, product_s: float) -> dict[str, Any]:
        if isinstance(self._executor, TimedExecutor):
            self._executor.set(call_s, product_s)
        return {}

    def counts(self) -> dict[str, Any]:
        """Since `set`. late_s: of each call, how long after its end the server's code went on."""
        executor = self._executor
        if isinstance(executor, TimedExecutor):
            return {"calls": executor.calls, "products": executor.products, "late_s": executor.late_s}
        return {"calls": executor.calls}

    def close(self) -> None:
        self._runner.run(self._thread.run(self._stop()))
        self._thread.stop()

    async def _serve(self, endpoint: str, model: str, timed: bool) -> None:
        if timed:
            self._executor = TimedExecutor()
        bound = asyncio.Event()
        self._serving = asyncio.create_task(_run_server(endpoint, Checkpoint.find(model), self._executor, bound))
        await bound.wait()

    async def _stop(self) -> None:
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.gather(self._serving, return_exceptions=True)


async def _run_server(endpoint: str, checkpoint: Checkpoint, executor: IdleExecutor, bound: asyncio.Event) -> None:
    context = zmq.asyncio.Context()
    try:
        with server_socket(context) as socket:
            socket.bind(endpoint)
            bound.set()
            await Server(socket, checkpoint, executor, None).run()
    finally:
        context.term()


def main() -> None:
    with asyncio.Runner() as runner:
        gpu = TimedGpu(runner)
        try:
            serve({"serve": gpu.serve, "set": gpu.set, "counts": gpu.counts})
        finally:
            gpu.close()


if __name__ == "__main__":
    main()
