"""The little of the weights that the TEE side needs: norms and the embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.memory import free_host_bytes, refuse_if_too_large
from tee_side.arrays import Rows, Tokens

EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Norms:
    """One layer's RMSNorm weights: [hidden] each."""

    attention: Rows
    mlp: Rows


class Weights:
    """Norms in float32; the embedding as the file has it, since casting it would double the largest part."""

    def __init__(self, checkpoint: Checkpoint, embedding: bool) -> None:
        """embedding: whether it is needed here. Raises BadInputError, before it is read, where it does not fit."""
        if embedding:
            _check_embedding(checkpoint)
        self._embedding = checkpoint.read(EMBEDDING) if embedding else torch.empty(0)
        self.final_norm = _norm(checkpoint, "model.norm.weight")
        self.layers = tuple(
            Norms(
                _norm(checkpoint, f"model.layers.{layer}.input_layernorm.weight"),
                _norm(checkpoint, f"model.layers.{layer}.post_attention_layernorm.weight"),
            )
            for layer in range(checkpoint.spec.layers)
        )

    def embed(self, tokens: Tokens) -> Rows:
        """-> [n, hidden]."""
        return F.embedding(torch.from_numpy(tokens), self._embedding).float().numpy()


def _norm(checkpoint: Checkpoint, name: str) -> Rows:
    return checkpoint.read(name).float().numpy()


def _check_embedding(checkpoint: Checkpoint) -> None:
    tensor = checkpoint.tensors[EMBEDDING]
    arithmetic = f"{tensor.size // tensor.dtype.itemsize:,} parameters x {tensor.dtype.itemsize} bytes"
    what = f"the embedding of {checkpoint.name}"
    refuse_if_too_large(what, tensor.size, arithmetic, free_host_bytes(), "use a smaller model")
