"""Whether a model's linears fit the device, before any of them is read."""

from __future__ import annotations

import torch

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.memory import free_host_bytes, gib, refuse_if_too_large
from asynctsqp.model_spec import ModelSpec

SPARE_BYTES = 1 << 30  # of a GPU: libraries' workspaces (32 MiB a stream), recorded calls, what passes through


def check(checkpoint: Checkpoint, parameters: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raises BadInputError, with the arithmetic, where so many weights in this dtype do not fit."""
    needed, free = parameters * dtype.itemsize, free_bytes(device)
    arithmetic = f"{parameters:,} parameters x {dtype.itemsize} bytes"
    if device.type == "cpu":  # a tensor is read as the file has it, next to what it becomes a part of
        reading = max(tensor.size for tensor in checkpoint.tensors.values())
        needed, arithmetic = needed + reading, f"{arithmetic} + {gib(reading)} to read"
    narrower = needed - parameters * (dtype.itemsize - 2) <= free
    advice = "use --dtype bfloat16 or a smaller model" if narrower else "use a smaller model"
    refuse_if_too_large(f"{checkpoint.name} in {str(dtype).removeprefix('torch.')}", needed, arithmetic, free, advice)


def linear_parameters(spec: ModelSpec) -> int:
    """How many numbers the linears of a model hold, biases included."""
    return sum(
        linear.out_features * (linear.in_features + linear.bias) * spec.layers_of(op)
        for op, linear in spec.linears.items()
    )


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for what comes next
        return max(0, free + kept - SPARE_BYTES)
    return free_host_bytes()
