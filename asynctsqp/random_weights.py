"""Models with random weights in known shapes, made where they are needed: nothing is downloaded or stored.

An element depends on the model's name, the tensor's name and its own position alone, so that each side makes only
what it needs and both have the same. It is a 16-bit piece of a PCG64 stream, whose seeding and integers numpy
promises not to change, scaled and rounded by IEEE arithmetic: any numpy and torch, on any little-endian CPU, agree.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path

import numpy as np
import torch

from asynctsqp.errors import CheckpointError
from asynctsqp.model_spec import ModelSpec
from asynctsqp.tensor_codec import bytes_of

PREFIX = "random:"
SHAPES = Path(__file__).parent / "random_models"
PER_DRAW = 4  # elements of 16 bits in each 64-bit number of the stream
BLOCK = 1 << 17  # elements at a time, so that what lies between stream and result stays in the cache
INT16_STD = 65536 / sqrt(12)  # of whole numbers that are uniform over 16 bits


@dataclass(frozen=True)
class RandomTensor:
    """A tensor whose elements are uniform around `mean` with standard deviation `std`."""

    seed: int
    shape: tuple[int, ...]
    mean: float
    std: float
    dtype: torch.dtype = torch.bfloat16

    @property
    def size(self) -> int:
        """In bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def read_range(self, start: int, size: int) -> bytes:
        """The bytes from `start` on, fewer than `size` at the end; no others are made."""
        skip = start % (PER_DRAW * self.dtype.itemsize)
        end = min(start + size, self.size)
        values = torch.empty(-(-(end - start + skip) // self.dtype.itemsize), dtype=self.dtype)
        self._fill(values, (start - skip) // self.dtype.itemsize)
        return bytes(bytes_of(values)[skip : skip + end - start])

    def read_into(self, destination: torch.Tensor) -> None:
        """Fills a contiguous CPU tensor of this tensor's dtype and number of elements."""
        self._fill(destination.view(-1), 0)

    def _fill(self, values: torch.Tensor, first: int) -> None:
        """values: [n], becomes the elements from number `first`, the beginning of a draw."""
        stream = np.random.PCG64(self.seed).advance(first // PER_DRAW)
        for block in values.split(BLOCK):
            draws = stream.random_raw(-(-len(block) // PER_DRAW))
            pieces = torch.from_numpy(draws.view(np.int16))[: len(block)]
            block.copy_(pieces.float().mul_(self.std / INT16_STD).add_(self.mean))


def shapes_directory(name: str) -> Path:
    """Where the config and the tokenizer for `random:NAME` lie. name: a known model's, or a directory of one's own.

    Raises CheckpointError for any other.
    """
    known = sorted(directory.name for directory in SHAPES.iterdir())
    if name in known:
        return SHAPES / name
    if os.path.isfile(os.path.join(name, "config.json")):  # unlike Path.is_file, says no to whatever is no name
        return Path(name)
    raise CheckpointError(
        f"there is no random model {name!r}: take {', '.join(known)}, or a directory with a config.json"
    )


def random_tensors(name: str, spec: ModelSpec) -> dict[str, RandomTensor]:
    """Every tensor of a model of these shapes.

    Products keep the size of what goes in: a matrix has the standard deviation 1 / sqrt(in_features), and norms
    are near one.
    """
    return {
        tensor: RandomTensor(
            seed=int.from_bytes(hashlib.sha256(os.fsencode(f"{name} {tensor}")).digest()),
            shape=shape,
            mean=1.0 if tensor.endswith("norm.weight") else 0.0,
            std=1 / sqrt(shape[-1]),
        )
        for tensor, shape in spec.tensor_shapes().items()
    }
