"""Angles of every rope type, by transformers' own module: of whole prompts, and of sequences that grow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tee_side.rope import Angles, Ropes

TYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "longrope": {
        "factor": 2.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0 + 0.1 * index for index in range(8)],
        "long_factor": [2.0 + 0.5 * index for index in range(8)],
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
POSITIONS = 64


def config(kind: str) -> LlamaConfig:
    parameters = {"rope_type": kind, "rope_theta": 10000.0, **TYPES[kind]}
    return LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=POSITIONS, rope_parameters=parameters
    )


def check(angles: Angles, module: LlamaRotaryEmbedding, position: int, length: int) -> None:
    positions = torch.arange(position, position + length).unsqueeze(0)
    cos, sin = (table[0].unsqueeze(1).numpy() for table in module(torch.empty(0), positions))
    signs = np.where(np.arange(16) < 8, -1, 1)  # ours are for x with its halves swapped
    np.testing.assert_allclose(angles[0], cos, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(angles[1], sin * signs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("prompt", [5, 33, 63, 100])
def test_a_prompt_and_the_steps_after_it(kind: str, prompt: int) -> None:
    """Beyond the model's own context too, and across the length from which frequencies change."""
    module = LlamaRotaryEmbedding(config(kind))
    rope = Ropes(config(kind)).for_sequence(prompt)
    check(rope.angles(0, prompt), module, 0, prompt)
    for position in range(prompt, prompt + 40):
        check(rope.angles(position, 1), module, position, 1)


@pytest.mark.parametrize("kind", TYPES)
def test_a_sequence_does_not_depend_on_those_before_it(kind: str) -> None:
    ropes = Ropes(config(kind))
    long = ropes.for_sequence(100)
    long.angles(0, 100)
    long.angles(100, 1)
    check(ropes.for_sequence(7).angles(0, 7), LlamaRotaryEmbedding(config(kind)), 0, 7)


def test_an_unknown_type_is_named() -> None:
    strange = config("default")
    strange.rope_parameters["rope_type"] = "spiral"
    with pytest.raises(ValueError, match="'spiral'"):
        Ropes(strange).for_sequence(1)
