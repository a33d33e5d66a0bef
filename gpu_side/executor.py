"""What runs a program: on CPU threads (cpu.py), or on CUDA streams (cuda.py).

An executor takes tensors that lie in the client's memory (shared, or a received message) and writes the
result into the client's memory. It never blocks the event loop for longer than a decode-sized product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from asynctsqp.limits import DECODE_ROWS
from asynctsqp.model_spec import PARTS, ModelSpec, Op
from asynctsqp.shm import Region

DECODE_KEYS = 4096  # attention to so many keys is no longer than a decode step's product
# Multiply-adds that the event loop waits for: some 25 ms on two cores, as a decode step's widest product of an 8B model
SHORT_WORK = 1 << 31

Tensors = tuple[torch.Tensor, ...]
Program = Callable[[Tensors, Tensors], None]  # computes the outputs, which are there already, from the inputs
Times = tuple[float, float]  # when a computation began, by time.perf_counter, and how many seconds it took


class Executor(Protocol):
    """One device."""

    device: torch.device

    @property
    def looks(self) -> int:
        """As Doorbell wants it: what waiting for calls may take from whoever computes."""

    inline: bool  # `run` computes what is short there and then, so that a task for it is waste

    def buffer(self, size: int) -> torch.Tensor:
        """`size` bytes of host memory that results can be copied to, zeroed: no call's leftovers in another's gaps."""

    async def run(
        self,
        program: Program,
        inputs: Tensors,
        outputs: Tensors,
        short: bool,
        lane: object,
        repeats: object = None,
    ) -> Times:
        """Runs a program on tensors in host memory. Calls of one lane run in order, but for tensors that
        came in messages, which may have to be copied first. short: as `short_rows` says.

        repeats: the lane's later calls with an equal one are this program on these very tensors again, until
        `forget`; None promises nothing. Raises DeviceLost, or what the program raises.
        """

    def pin(self, region: Region) -> None:
        """Prepares a client's region for transfers. Raises SharedMemoryError where the device cannot use it."""

    def unpin(self, region: Region) -> None:
        """Undoes `pin`, after `forget` of all lanes that used the region."""

    def forget(self, lanes: list[object]) -> None:
        """Drops what was kept for a client's lanes, when nothing runs on them any more."""


def short_rows(spec: ModelSpec) -> dict[int, int]:
    """Up to how many rows each operation is short: a decode step's, or one that no thread's wake-ups pay for."""
    weights = {op: linear.in_features * linear.out_features for op, linear in spec.linears.items()}
    mlp = weights[Op.O] + weights[Op.GATE_UP] + weights[Op.DOWN]
    weights |= {Op.NORM_QKV: weights[Op.QKV], Op.O_MLP: mlp, Op.LAYER: mlp + weights[Op.QKV]}
    weights |= {part: weights[whole] for whole, parts in PARTS.items() for part in parts}
    return {op: max(DECODE_ROWS, SHORT_WORK // weights[op]) if op in weights else DECODE_ROWS for op in Op}
