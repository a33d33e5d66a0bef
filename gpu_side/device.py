"""Which device a GPU side computes on."""

from __future__ import annotations

import torch

from asynctsqp.errors import BadInputError
from gpu_side.cpu import CpuExecutor
from gpu_side.cuda import CudaExecutor
from gpu_side.executor import Executor


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
    return CudaExecutor(torch.device("cuda", chosen.index or 0))
