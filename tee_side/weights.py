"""The little of the weights that the TEE side needs: norms and the embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from asynctsqp.checkpoint import Checkpoint


@dataclass(frozen=True)
class Norms:
    """One layer's RMSNorm weights: [hidden] float32 each."""

    attention: torch.Tensor
    mlp: torch.Tensor


class Weights:
    """Norms in float32; the embedding as the file has it, since casting it would double the largest part."""

    def __init__(self, checkpoint: Checkpoint, embedding: bool) -> None:
        """embedding: whether it is needed here."""
        self._embedding = checkpoint.read("model.embed_tokens.weight") if embedding else torch.empty(0)
        self.final_norm = checkpoint.read("model.norm.weight").float()
        self.layers = tuple(
            Norms(
                checkpoint.read(f"model.layers.{layer}.input_layernorm.weight").float(),
                checkpoint.read(f"model.layers.{layer}.post_attention_layernorm.weight").float(),
            )
            for layer in range(checkpoint.spec.layers)
        )

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: [n] int64 -> [n, hidden] float32."""
        return F.embedding(tokens, self._embedding).float()
