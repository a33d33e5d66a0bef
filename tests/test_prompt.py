"""What a prompt may be in Python: text, token ids, chat messages, and nothing that only looks like one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asynctsqp.errors import PromptError
from asynctsqp.model_spec import ModelSpec
from tee_side.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Tokenizer:
    return Tokenizer(demo_model, ModelSpec.read(demo_model / "config.json").vocab_size)


@pytest.mark.parametrize("prompt", [[1, 2, 3], (1, 2, 3), list(np.array([1, 2, 3])), range(1, 4)])
def test_token_ids_are_taken_as_they_are(tokenizer: Tokenizer, prompt: Any) -> None:
    encoded = tokenizer.encode(prompt)
    assert encoded == [1, 2, 3]
    assert {type(token) for token in encoded} == {int}


@pytest.mark.parametrize(
    "prompt",
    [b"Hello", bytearray(b"Hello"), 7, None, {1, 2}, "", [], [True], [1.0], [-1], [1 << 40], [1, {"role": "user"}]],
    ids=repr,
)
def test_what_is_no_prompt_is_refused(tokenizer: Tokenizer, prompt: Any) -> None:
    with pytest.raises(PromptError):
        tokenizer.encode(prompt)
