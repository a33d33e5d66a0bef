"""With how many threads a decode step's products are computed: with all, or with one where that is faster.

More threads read the weights faster and cost a wake-up for each product. What weighs more depends on the processor, the
dtype and the shape, and on how much of a core the TEE side takes meanwhile. So it is found out on the real products:
the first ones of each shape are computed in turns, and what took less time altogether stays. Where the number of
threads changed a single bit of a result there is nothing to choose: all of them compute.
"""

from __future__ import annotations

import statistics
import time

import torch

from asynctsqp.limits import DECODE_ROWS
from gpu_side.executor import Program, Tensors, Times

ONE = 1
SAMPLES = 9  # of each product with each number of threads: their median counts, and a short disturbance does not


class ShortThreads:
    """Of one process. To be used by one thread."""

    def __init__(self, threads: int) -> None:
        """threads: all."""
        self._threads = threads
        self._trials: dict[tuple[torch.Size, torch.Size, torch.dtype], _Trial] = {}

    def timed(self, program: Program, inputs: Tensors, outputs: Tensors, repeats: object) -> Times:
        """repeats: as in Executor.run; a product that is not repeated is compared with nothing."""
        x, y = inputs[0], outputs[0]
        if self._threads == ONE or y.shape[-2] > DECODE_ROWS:
            return timed(program, inputs, outputs)
        kind = x.shape, y.shape, x.dtype
        trial = self._trials.get(kind)
        if trial is None and repeats is None:  # attention's shape is another one at each step: it leaves nothing here
            return timed(program, inputs, outputs)
        if trial is None:
            trial = self._trials[kind] = _Trial(self._threads)
        try:
            return trial.timed(program, inputs, outputs, repeats)
        finally:
            torch.set_num_threads(self._threads)


class _Trial:
    """Of products of one shape. chosen: how many threads, once that is known."""

    def __init__(self, threads: int) -> None:
        self.chosen: int | None = None
        self._threads = threads
        self._seconds: dict[object, list[float]] = {}  # each product's, in turns: with one thread, with all
        self._samples = 0

    def timed(self, program: Program, inputs: Tensors, outputs: Tensors, repeats: object) -> Times:
        if self.chosen is None and not self._samples and not self._are_alike(program, inputs, outputs):
            self.chosen = self._threads
        if self.chosen is not None or repeats is None:
            torch.set_num_threads(self.chosen or self._threads)
            return timed(program, inputs, outputs)
        seconds = self._seconds.setdefault(repeats, [])
        torch.set_num_threads(self._threads if len(seconds) % 2 else ONE)
        times = timed(program, inputs, outputs)
        seconds.append(times[1])
        self._samples += 1
        if self._samples == 2 * SAMPLES * len(self._seconds):
            self._choose()
        return times

    def _are_alike(self, program: Program, inputs: Tensors, outputs: Tensors) -> bool:
        """Whether one thread and all come to the same bits. Afterwards all threads are set."""
        torch.set_num_threads(ONE)
        program(inputs, outputs)
        single = [output.clone() for output in outputs]
        torch.set_num_threads(self._threads)
        program(inputs, outputs)
        return all(map(_same_bits, single, outputs))

    def _choose(self) -> None:
        compared = [seconds for seconds in self._seconds.values() if len(seconds) > 1]
        one = sum(statistics.median(seconds[0::2]) for seconds in compared)
        every = sum(statistics.median(seconds[1::2]) for seconds in compared)
        self.chosen = ONE if one < every else self._threads
        self._seconds.clear()


def timed(program: Program, inputs: Tensors, outputs: Tensors) -> Times:
    start = time.perf_counter()
    program(inputs, outputs)
    return start, time.perf_counter() - start


def _same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.equal(x.view(torch.uint8), y.contiguous().view(torch.uint8))
