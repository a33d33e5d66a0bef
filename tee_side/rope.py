"""Rotary position embeddings, by transformers: every rope type that it knows works here."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tee_side.arrays import Rows

# cos and sin, each [tokens, 1, head_dim]: x rotated is x * cos + (x with its halves swapped) * sin
Angles = tuple[Rows, Rows]


class Rope(Protocol):
    """Where the angles of positions come from."""

    def angles(self, position: int, length: int) -> Angles:
        """Of consecutive positions."""


class RopeTable:
    """Angles that depend on the position alone: computed once, for all sequences. Grows as they do."""

    def __init__(self, config: LlamaConfig) -> None:
        self._embedding = LlamaRotaryEmbedding(config)
        self._most = config.max_position_embeddings
        self._table = _compute(self._embedding, 0, 1)

    def angles(self, position: int, length: int) -> Angles:
        cos, sin = self._table
        end = position + length
        if end > len(cos):
            cos, sin = self._table = _compute(self._embedding, 0, min(max(2 * end, 256), max(self._most, end)))
        return cos[position:end], sin[position:end]


class GrowingRope:
    """Angles that change with how long the sequence has become: of one sequence, computed at each step."""

    def __init__(self, config: LlamaConfig, prompt_tokens: int) -> None:
        self._embedding = LlamaRotaryEmbedding(config)
        # of the whole prompt at once, however many chunks it is cut into
        self._prompt = _compute(self._embedding, 0, prompt_tokens)

    def angles(self, position: int, length: int) -> Angles:
        cos, sin = self._prompt
        end = position + length
        if end <= len(cos):
            return cos[position:end], sin[position:end]
        return _compute(self._embedding, position, length)


class Ropes:
    """A model's rope for each new sequence."""

    def __init__(self, config: LlamaConfig) -> None:
        self._config = config
        # the two for which transformers' dynamic_rope_update recomputes the frequencies
        kind = str(LlamaRotaryEmbedding(config).rope_type)
        self._shared = None if "dynamic" in kind or kind == "longrope" else RopeTable(config)

    def for_sequence(self, prompt_tokens: int) -> Rope:
        return self._shared or GrowingRope(self._config, prompt_tokens)


def _compute(embedding: LlamaRotaryEmbedding, position: int, length: int) -> Angles:
    positions = torch.arange(position, position + length).unsqueeze(0)
    like = torch.empty(0)  # tells transformers which device and dtype we want
    cos, sin = (table[0].unsqueeze(1).numpy() for table in embedding(like, positions))
    sin = sin.copy()
    np.negative(sin[..., : sin.shape[-1] // 2], out=sin[..., : sin.shape[-1] // 2])
    return cos, sin
