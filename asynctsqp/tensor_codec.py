"""Names, sizes and raw bytes of tensors on the wire and in files."""

from __future__ import annotations

import mmap

import torch

WIRE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# safetensors' names (its README's format section) for the dtypes that a weight may have
FILE_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def view_of(
    buffer: mmap.mmap | memoryview, dtype: torch.dtype, rows: int, columns: int, offset: int = 0
) -> torch.Tensor:
    """A [rows, columns] tensor over `buffer` from byte `offset`: no copy. The buffer must be large enough."""
    return torch.frombuffer(buffer, dtype=dtype, count=rows * columns, offset=offset).view(rows, columns)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The raw bytes of a contiguous CPU tensor: no copy; the view keeps the tensor alive."""
    return tensor.view(-1).view(torch.uint8).numpy().data
