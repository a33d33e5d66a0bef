"""Rotary position embeddings, with transformers' frequencies: every rope type that it knows works here.

The module of transformers that turns them into angles is not used: it brings in all that transformers needs to run
whole models, a third of what this process would load and an enclave would have to trust.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast

import numpy as np
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tee_side.arrays import Rows
from tee_side.llama_config import LlamaConfig

# cos and sin, each [tokens, 1, head_dim]: x rotated is x * cos + (x with its halves swapped) * sin
Angles = tuple[Rows, Rows]

GROWING = ("dynamic", "longrope")  # whose frequencies depend on how long a sequence has become


class Rope(Protocol):
    """Where the angles of positions come from."""

    def angles(self, position: int, length: int) -> Angles:
        """Of consecutive positions."""


class RopeTable:
    """Angles that depend on the position alone: computed once, for all sequences. Grows as they do."""

    def __init__(self, config: LlamaConfig) -> None:
        self._config = config
        self._most = config.max_position_embeddings
        self._table = _compute(config, 0, 1)

    def angles(self, position: int, length: int) -> Angles:
        cos, sin = self._table
        end = position + length
        if end > len(cos):
            cos, sin = self._table = _compute(self._config, 0, min(max(2 * end, 256), max(self._most, end)))
        return cos[position:end], sin[position:end]


class GrowingRope:
    """Angles that change with how long the sequence has become: of one sequence, computed at each step."""

    def __init__(self, config: LlamaConfig, prompt_tokens: int) -> None:
        self._config = config
        # of the whole prompt at once, however many chunks it is cut into
        self._prompt = _compute(config, 0, prompt_tokens)

    def angles(self, position: int, length: int) -> Angles:
        cos, sin = self._prompt
        end = position + length
        if end <= len(cos):
            return cos[position:end], sin[position:end]
        return _compute(self._config, position, length)


class Ropes:
    """A model's rope for each new sequence."""

    def __init__(self, config: LlamaConfig) -> None:
        self._config = config
        self._shared = None if _kind(config) in GROWING else RopeTable(config)

    def for_sequence(self, prompt_tokens: int) -> Rope:
        return self._shared or GrowingRope(self._config, prompt_tokens)


def _compute(config: LlamaConfig, position: int, length: int) -> Angles:
    """Of positions that end a sequence."""
    frequencies, scaling = _frequencies(config, position + length)
    half = torch.arange(position, position + length)[:, None].float() * frequencies
    angles = torch.cat((half, half), dim=-1).unsqueeze(1)
    cos, sin = (angles.cos() * scaling).numpy(), (angles.sin() * scaling).numpy()
    np.negative(sin[..., : half.shape[1]], out=sin[..., : half.shape[1]])
    return cos, sin


def _frequencies(config: LlamaConfig, length: int) -> tuple[torch.Tensor, float]:
    """[head_dim / 2], and what cosines and sines are multiplied by. Raises ValueError for an unknown rope type."""
    kind = _kind(config)
    if kind == "default":  # Su et al., RoFormer, 2021, section 3.2.2
        size = config.head_dim or config.hidden_size // config.num_attention_heads
        return 1.0 / _parameters(config)["rope_theta"] ** (torch.arange(0, size, 2).float() / size), 1.0
    if kind not in ROPE_INIT_FUNCTIONS:
        raise ValueError(f"there is no rope type {kind!r}")
    # a tensor, as transformers has it there: what comes of it is rounded as there
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=torch.tensor(length))


def _kind(config: LlamaConfig) -> str:
    return str(_parameters(config)["rope_type"])


def _parameters(config: LlamaConfig) -> Mapping[str, Any]:
    """Transformers fills them in from a checkpoint's older ways to say them."""
    return cast(Mapping[str, Any], config.rope_parameters)
