"""What goes into an engine: prompts of every kind and length, options that must change nothing, and bad ones."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import asynctsqp
from asynctsqp import Engine

PROMPT = [1, *range(100, 140)]
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
Connect = Callable[..., Engine]


@pytest.mark.parametrize("transport", ["shm", "binary"])
def test_calls_larger_than_a_slot_change_nothing(transport: str, connect: Connect) -> None:
    """One lm_head row fills a slot: logits go in as many calls as there are tokens, layers in some."""
    prompt = [1, *range(100, 410)]

    async def answer(**options: Any) -> tuple[list[int], torch.Tensor]:
        async with connect(transport=transport, **options) as engine:
            done = await engine.complete(prompt, max_new_tokens=8, **GREEDY)
            return done.token_ids, await engine.logits(prompt)

    tokens, scores = asyncio.run(answer())
    small_tokens, small_scores = asyncio.run(answer(slot_bytes=4 * 49152))
    assert small_tokens == tokens
    torch.testing.assert_close(small_scores, scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64, 310, 311])
def test_chunks_of_a_prompt_change_nothing(chunk_tokens: int, connect: Connect) -> None:
    prompt = [1, *range(100, 410)]

    async def answer(**options: Any) -> tuple[list[int], torch.Tensor]:
        async with connect(**options) as engine:
            done = await engine.complete(prompt, max_new_tokens=8, **GREEDY)
            return done.token_ids, await engine.logits(prompt)

    tokens, scores = asyncio.run(answer())
    chunked_tokens, chunked_scores = asyncio.run(answer(chunk_tokens=chunk_tokens))
    assert chunked_tokens == tokens
    torch.testing.assert_close(chunked_scores, scores, rtol=0, atol=1e-4)


def test_logits_and_tokens_agree(connect: Connect) -> None:
    async def run() -> None:
        async with connect() as engine:
            done = await engine.complete(PROMPT, max_new_tokens=16, temperature=0)
            scores = await engine.logits(PROMPT + done.token_ids)
        assert scores.shape == (len(PROMPT) + len(done.token_ids), 49152)
        assert scores.dtype == torch.float32
        assert scores.device.type == "cpu"
        assert scores[len(PROMPT) - 1 : -1].argmax(-1).tolist() == done.token_ids

    asyncio.run(run())


def test_text_and_messages_are_what_the_tokenizer_makes_of_them(
    connect: Connect, tiny_model: Callable[[str], Path]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("gqa"))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    templated = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    pairs: list[tuple[Any, list[int]]] = [("Hello there", tokenizer.encode("Hello there")), (messages, templated)]

    async def run() -> None:
        async with connect() as engine:
            for prompt, ids in pairs:
                asked, expected = [await engine.complete(p, max_new_tokens=8, **GREEDY) for p in (prompt, list(ids))]
                assert asked.prompt_tokens == len(ids)
                assert (asked.text, asked.token_ids) == (expected.text, expected.token_ids)

    asyncio.run(run())


BAD_CALLS: list[dict[str, Any]] = [
    {"max_new_tokens": 0},
    {"max_new_tokens": "8"},
    {"temperature": -1},
    {"temperature": float("nan")},
    {"top_p": 0},
    {"stop": ""},
    {"stop": [""]},
    {"no_such_option": 1},
    {"prompt": ""},
    {"prompt": []},
    {"prompt": [49152]},
    {"prompt": [-1]},
    {"prompt": [1, "two"]},
    {"prompt": [1.5]},
    {"prompt": [True]},
    {"prompt": None},
    {"prompt": 7},
    {"prompt": [{"role": "user"}]},
    {"prompt": [{"role": "user", "content": "a"}, 5]},
    {"prompt": list(range(512))},
    {"prompt": "caf\udce9"},
]


def test_bad_calls_harm_nobody(connect: Connect) -> None:
    async def outcome(engine: Engine, bad: dict[str, Any]) -> object:
        arguments = {"prompt": PROMPT, "max_new_tokens": 1} | bad
        try:
            return await engine.complete(arguments.pop("prompt"), **arguments)
        except Exception as error:
            return error

    async def run() -> None:
        async with connect() as engine:
            outcomes = [(bad, await outcome(engine, bad)) for bad in BAD_CALLS]
            wrong = [pair for pair in outcomes if not isinstance(pair[1], asynctsqp.BadInputError)]
            assert not wrong
            assert all(str(error).isprintable() for _, error in outcomes)
            await engine.complete(PROMPT, max_new_tokens=1)

    asyncio.run(run())


BAD_OPTIONS: list[dict[str, Any]] = [
    {"lanes": 0},
    {"lanes": 1.5},
    {"dtype": "int8"},
    {"no_such_option": 1},
    {"kv_memory": "much"},
    {"shm_name": 5},
    {"reconnect_s": float("nan")},
    {"partition": ["shielded"]},
    {"protect": None},
]


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=str)
def test_bad_options_are_refused_before_anything_is_started(
    options: dict[str, Any], tiny_model: Callable[[str], Path]
) -> None:
    with pytest.raises(asynctsqp.BadInputError):
        Engine.launch(tiny_model("gqa"), **options)
