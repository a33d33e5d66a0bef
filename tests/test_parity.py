"""Same tokens and scores as transformers, the oracle that this project did not write."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import asynctsqp
from tests.models import TINY

LONG = " ".join(
    f"The {n}th day was {'bright' if n % 3 else 'grey'} and we walked {n * 7 % 13} miles." for n in range(60)
)

DEMO_PROMPTS: list[str | list[dict[str, str]]] = [
    "Once upon a time",
    "The capital of France is",
    "def fibonacci(n):",
    "1, 2, 3, 5, 8,",
    "Œuvre d'art: 東京の夜 🌃",
    LONG,
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "user", "content": "Write a haiku about rain."}],
    [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Is water wet?"}],
    [{"role": "user", "content": LONG + " Summarise this."}],
]


@functools.lru_cache(maxsize=2)
def oracle(model_directory: Path) -> Any:
    """transformers' model in float32. Kept, because loading one takes longer than its short answers."""
    return AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)


def reference(model_directory: Path, prompt: list[int], new_tokens: int) -> list[int]:
    """transformers' own greedy answer."""
    ids = torch.tensor([prompt])
    answer = oracle(model_directory).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False
    )
    return answer[0, len(prompt) :].tolist()


def encode(tokenizer: Any, prompt: str | list[dict[str, str]]) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer.encode(prompt))
    return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))


def test_demo_model_answers_like_transformers(demo_model: Path) -> None:
    async def answers() -> list[list[int]]:
        async with asynctsqp.Engine.launch(demo_model) as engine:
            return [
                (await engine.complete(prompt, max_new_tokens=64, temperature=0)).token_ids for prompt in DEMO_PROMPTS
            ]

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    prompts = [encode(tokenizer, prompt) for prompt in DEMO_PROMPTS]
    assert max(map(len, prompts)) > 700
    assert asyncio.run(answers()) == [reference(demo_model, prompt, 64) for prompt in prompts]


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_answer_like_transformers(name: str, tiny_model: Callable[[str], Path]) -> None:
    directory = tiny_model(name)
    prompt = [1, *range(100, 300, 2)]

    async def answer() -> tuple[list[int], torch.Tensor]:
        async with asynctsqp.Engine.launch(directory) as engine:
            done = await engine.complete(prompt, max_new_tokens=64, temperature=0, ignore_eos=True)
            return done.token_ids, await engine.logits(prompt + done.token_ids)

    tokens, scores = asyncio.run(answer())
    with torch.no_grad():
        expected = oracle(directory)(torch.tensor([prompt + tokens])).logits[0]
    assert (scores - expected).abs().max() < 2e-4
    assert tokens == reference(directory, prompt, 64)


def test_demo_logits_are_those_of_transformers(demo_model: Path) -> None:
    """float32: within 2e-4; bfloat16: as near to float32 as transformers' own bfloat16 is."""
    tokens = AutoTokenizer.from_pretrained(demo_model).encode(LONG)[:512]

    async def ours(dtype: str) -> torch.Tensor:
        async with asynctsqp.Engine.launch(demo_model, dtype=dtype) as engine:
            return await engine.logits(tokens)

    def theirs(dtype: torch.dtype) -> torch.Tensor:
        with torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=dtype)
            return model(torch.tensor([tokens])).logits[0].float()

    exact = theirs(torch.float32)
    assert (asyncio.run(ours("float32")) - exact).abs().max() < 2e-4
    their_error = (theirs(torch.bfloat16) - exact).abs().mean()
    our_error = (asyncio.run(ours("bfloat16")) - exact).abs().mean()
    print(f"bfloat16: mean |logit - float32 logit| {our_error:.4f}, transformers {their_error:.4f}")
    assert our_error <= 1.2 * their_error
