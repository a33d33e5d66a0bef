"""What the sampler draws, against the textbook's probabilities; and whose settings count."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from asynctsqp.config import SamplingOptions
from tee_side.sampler import Sampler, end_tokens

SCORES = np.array([2.0, 1.5, 1.0, 0.0, -1.0, -3.0], np.float32)
DRAWS = 20_000
CHI_SQUARE_LIMIT = 35.0  # 5 degrees of freedom: passes a right sampler but once in about a million runs


def counts(options: dict[str, Any], defaults: dict[str, Any]) -> torch.Tensor:
    sampler = Sampler(SamplingOptions(seed=7, **options), GenerationConfig(**defaults), frozenset([0]))
    return torch.bincount(torch.tensor([sampler.choose(SCORES, [3]) for _ in range(DRAWS)]), minlength=len(SCORES))


def expected(temperature: float, allowed: list[int]) -> torch.Tensor:
    """softmax(scores / temperature) over the allowed tokens alone."""
    weights = torch.zeros(len(SCORES), dtype=torch.float64)
    weights[allowed] = (torch.from_numpy(SCORES).double()[allowed] / temperature).exp()
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("options", "defaults", "temperature", "allowed"),
    [
        ({"temperature": 1.0}, {}, 1.0, [0, 1, 2, 3, 4, 5]),
        ({"temperature": 0.5}, {}, 0.5, [0, 1, 2, 3, 4, 5]),
        ({"temperature": 2.0, "top_k": 3}, {}, 2.0, [0, 1, 2]),
        ({"temperature": 1.0, "top_p": 0.6}, {}, 1.0, [0, 1]),
        ({"temperature": 1.0, "ignore_eos": True}, {}, 1.0, [1, 2, 3, 4, 5]),
        ({}, {"do_sample": True, "temperature": 2.0, "top_k": 2}, 2.0, [0, 1]),
        ({"top_k": 0}, {"do_sample": True, "temperature": 2.0, "top_k": 2}, 2.0, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_draws_follow_the_formula(
    options: dict[str, Any], defaults: dict[str, Any], temperature: float, allowed: list[int]
) -> None:
    drawn, wanted = counts(options, defaults), expected(temperature, allowed) * DRAWS
    assert drawn[wanted == 0].sum() == 0
    seen = wanted > 0
    assert ((drawn[seen] - wanted[seen]) ** 2 / wanted[seen]).sum() < CHI_SQUARE_LIMIT


def test_greedy_is_the_default_and_the_checkpoint_may_say_otherwise() -> None:
    assert counts({}, {})[0] == DRAWS
    assert counts({"temperature": 0}, {"do_sample": True})[0] == DRAWS
    assert counts({}, {"do_sample": True})[0] < DRAWS


def test_the_checkpoints_repetition_penalty_counts() -> None:
    sampler = Sampler(SamplingOptions(), GenerationConfig(repetition_penalty=2.0), frozenset())
    assert sampler.choose(SCORES, [0]) == 1


def test_end_tokens_are_the_first_source_that_names_any() -> None:
    assert end_tokens(GenerationConfig(), GenerationConfig(eos_token_id=[5, 6])) == {5, 6}
    assert end_tokens(GenerationConfig(eos_token_id=2), GenerationConfig(eos_token_id=[5, 6])) == {2}
    assert end_tokens(GenerationConfig()) == frozenset()
