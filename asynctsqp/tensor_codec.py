"""Names, sizes and raw bytes of tensors on the wire and in files."""

from __future__ import annotations

import torch

WIRE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# safetensors' names (its README's format section) for the dtypes that a weight may have
FILE_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def wire_dtype(dtype: str, weight_bits: int) -> torch.dtype:
    """Of the tensors between the sides. weight_bits: 0 unless the products are of integer weights."""
    return torch.int32 if weight_bits else WIRE_DTYPES[dtype]


def writable(buffer: memoryview) -> memoryview:
    """The buffer, or a copy of one that is read-only: torch has no read-only tensors, and warns of them."""
    return memoryview(bytearray(buffer)) if buffer.readonly else buffer


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The raw bytes of a contiguous CPU tensor: no copy; the view keeps the tensor alive."""
    return tensor.view(-1).view(torch.uint8).numpy().data
