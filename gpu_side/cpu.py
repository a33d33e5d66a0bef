"""Programs on the CPU's threads."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import torch

from asynctsqp.doorbell import LOOKS
from asynctsqp.shm import Region
from gpu_side.executor import Program, Tensors, Times
from gpu_side.short_threads import ShortThreads, timed


class CpuExecutor:
    """Short products inline, longer ones one after another in one thread (torch itself uses more)."""

    def __init__(self, threads: int) -> None:
        self.device = torch.device("cpu")
        self._busy = 0  # products that a thread computes now
        # OpenMP counts its threads for each thread that uses them by itself
        self._thread = ThreadPoolExecutor(1, "product", torch.set_num_threads, (threads,))
        self._short = ShortThreads(threads)
        self.inline = True

    @property
    def looks(self) -> int:
        """None while a thread computes: it needs the core that polling would take."""
        return 0 if self._busy else LOOKS

    def buffer(self, size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.uint8)

    async def run(
        self,
        program: Program,
        inputs: Tensors,
        outputs: Tensors,
        short: bool,
        lane: object,
        repeats: object = None,
    ) -> Times:
        if short:
            return self._short.timed(program, inputs, outputs, repeats)
        self._busy += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, timed, program, inputs, outputs)
        finally:
            self._busy -= 1

    def pin(self, region: Region) -> None:
        pass

    def unpin(self, region: Region) -> None:
        pass

    def forget(self, lanes: list[object]) -> None:
        pass
