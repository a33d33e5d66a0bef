"""The integer weights of a model's linears: read and quantized one matrix at a time, alike on both sides."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.model_spec import ModelSpec, Op
from asynctsqp.quantize import Quantized

Matrix = tuple[Op, int]  # a linear of a layer


def matrices(spec: ModelSpec) -> tuple[Matrix, ...]:
    """All linears of a model, in the order of the layers."""
    return tuple((op, layer) for layer in range(spec.layers) for op in spec.linears if layer < spec.layers_of(op))


def read(checkpoint: Checkpoint, matrix: Matrix, bits: int, device: torch.device) -> Quantized:
    """One of them, its parts stacked. Raises CheckpointError where a weight is not finite."""
    op, layer = matrix
    names = [part.format(layer=layer) + ".weight" for part, _ in checkpoint.spec.linears[op].parts]
    return Quantized.stack([Quantized.of(checkpoint.read(name).to(device), bits) for name in names])


def digest_of(weight: Quantized) -> bytes:
    """32 bytes that are equal where every weight and scale is."""
    digest = hashlib.sha256()
    weight.hash_into(digest)
    return digest.digest()


def fingerprint(digests: Iterable[bytes]) -> bytes:
    """Of all matrices in `matrices` order: what the two sides compare when they meet."""
    return hashlib.sha256(b"".join(digests)).digest()
