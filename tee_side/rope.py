"""Rotary position embeddings, by transformers: every rope type that it knows works here."""

from __future__ import annotations

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


class Rope:
    """The angles of one sequence. Not shared: some rope types depend on how long the sequence has become."""

    def __init__(self, config: LlamaConfig) -> None:
        self._embedding = LlamaRotaryEmbedding(config)
        self._like = torch.empty(0)  # tells transformers which device and dtype we want

    def angles(self, position: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, each [length, 1, head_dim] float32, of consecutive positions."""
        positions = torch.arange(position, position + length).unsqueeze(0)
        cos, sin = self._embedding(self._like, positions)
        return cos.view(length, 1, -1), sin.view(length, 1, -1)
