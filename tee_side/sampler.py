"""From scores to the next token, by transformers' own logits processors."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from asynctsqp.config import SamplingOptions
from tee_side.arrays import Rows


def generation_config(directory: Path) -> GenerationConfig:
    """The checkpoint's, or what its config.json implies."""
    if (directory / "generation_config.json").exists():
        return GenerationConfig.from_pretrained(directory)
    return GenerationConfig()


def end_tokens(*sources: object) -> frozenset[int]:
    """The end-of-sequence ids that the first source that knows any names."""
    for source in sources:
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return frozenset([found] if isinstance(found, int) else found)
    return frozenset()


class Sampler:
    """Chooses tokens for one sequence. `options` override the checkpoint's `defaults`."""

    def __init__(self, options: SamplingOptions, defaults: GenerationConfig, end: frozenset[int]) -> None:
        temperature = options.temperature
        if temperature is None:
            temperature = (1.0 if defaults.temperature is None else defaults.temperature) if defaults.do_sample else 0.0
        self._greedy = temperature == 0
        self._never = np.array(sorted(end) if options.ignore_eos else [], np.int64)
        self._processors = LogitsProcessorList()
        if defaults.repetition_penalty not in (None, 1.0):
            self._processors.append(RepetitionPenaltyLogitsProcessor(defaults.repetition_penalty))
        if not self._greedy:
            self._add_warpers(temperature, options, defaults)
        self._generator = torch.Generator()
        self._generator.manual_seed(secrets.randbits(63) if options.seed is None else options.seed)

    def _add_warpers(self, temperature: float, options: SamplingOptions, defaults: GenerationConfig) -> None:
        top_k = defaults.top_k if options.top_k is None else options.top_k
        top_p = defaults.top_p if options.top_p is None else options.top_p
        if temperature != 1.0:
            self._processors.append(TemperatureLogitsWarper(float(temperature)))
        if top_k:
            self._processors.append(TopKLogitsWarper(top_k))
        if top_p is not None and top_p < 1.0:
            self._processors.append(TopPLogitsWarper(float(top_p)))
        if defaults.min_p:
            self._processors.append(MinPLogitsWarper(defaults.min_p))

    def choose(self, scores: Rows, tokens: Sequence[int]) -> int:
        """scores: [vocab] after `tokens` (prompt included) -> the next token; the first of equals where greedy."""
        row = scores
        if len(self._never):
            row = row.copy()
            row[self._never] = -math.inf
        if self._processors:
            candidates = torch.from_numpy(row).unsqueeze(0).clone()
            row = self._processors(torch.tensor([tokens]), candidates)[0].numpy()  # type: ignore[arg-type]
        if self._greedy:
            return int(row.argmax())
        chances = torch.softmax(torch.from_numpy(row), dim=-1)
        return int(torch.multinomial(chances, 1, generator=self._generator))
