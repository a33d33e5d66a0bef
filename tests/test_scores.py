"""Log-probabilities: those of transformers, for tokens that were sampled and for prompts; and the bytes of tokens."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import asynctsqp
from asynctsqp import Alternative, BadInputError, Engine, TokenScore
from asynctsqp.errors import ProtocolError
from tee_side.generation import Scoring
from tee_side.scores import Scorer
from tee_side.token_bytes import TokenBytes
from tests.conftest import GpuProcess
from tests.processes import ROOT
from tests.test_engine import nothing_held

PROMPT = [1, *range(100, 140)]
LONG = [1, *range(100, 600)]
WARM: dict[str, Any] = {"max_new_tokens": 24, "temperature": 1.5, "top_p": 0.95, "seed": 3, "ignore_eos": True}
TEXT = "The capital of France is Paris. Œuvre d'art: 東京の夜 🌃\n\tdef f(x):  return x"
Connect = Callable[..., Engine]


def oracle(directory: Path, tokens: list[int]) -> torch.Tensor:
    """transformers' own log-probabilities after each token: [tokens, vocab]."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([tokens])).logits[0], dim=-1)


def assert_scores(scores: list[TokenScore], tokens: list[int], before: torch.Tensor, top: int, atol: float) -> None:
    """before: [tokens, vocab] the oracle's log-probabilities at the place of each token."""
    assert [score.token_id for score in scores] == tokens
    assert all(isinstance(score.logprob, float) and score.logprob <= 0 for score in scores)
    ours = torch.tensor([score.logprob for score in scores])
    torch.testing.assert_close(ours, before.gather(1, torch.tensor(tokens).unsqueeze(1))[:, 0], rtol=0, atol=atol)
    assert {len(score.top) for score in scores} == {top}
    if top:
        found = torch.tensor([[likely.logprob for likely in score.top] for score in scores])
        torch.testing.assert_close(found, before.topk(top, dim=1).values, rtol=0, atol=atol)
        ids = torch.tensor([[likely.token_id for likely in score.top] for score in scores])
        torch.testing.assert_close(found, before.gather(1, ids), rtol=0, atol=atol)
        assert all(len({likely.token_id for likely in score.top}) == top for score in scores)


@pytest.mark.parametrize("options", [{}, {"chunk_tokens": 7}, {"chunk_tokens": 40, "lanes": 1}], ids=str)
@pytest.mark.parametrize("top", [0, 5])
def test_a_prompt_is_as_likely_as_transformers_says(
    options: dict[str, Any], top: int, connect: Connect, tiny_model: Callable[[str], Path]
) -> None:
    async def run() -> list[TokenScore]:
        async with connect(**options) as engine:
            return await engine.score(PROMPT, top=top)

    first, *others = asyncio.run(run())
    assert (first.token_id, first.logprob, first.top) == (PROMPT[0], None, ())
    assert_scores(others, PROMPT[1:], oracle(tiny_model("gqa"), PROMPT)[:-1], top, atol=2e-4)


def test_real_text_is_as_likely_as_transformers_says(demo_model: Path) -> None:
    tokens = AutoTokenizer.from_pretrained(demo_model).encode(TEXT)

    async def run() -> list[TokenScore]:
        async with Engine.launch(demo_model) as engine:
            return await engine.score(TEXT, top=20)

    scores = asyncio.run(run())
    assert_scores(scores[1:], tokens[1:], oracle(demo_model, tokens)[:-1], 20, atol=2e-4)
    assert b"".join(score.data for score in scores) == TEXT.encode()
    assert any("\ufffd" in score.text for score in scores), "no token was a part of a character"


def test_a_prompt_of_one_token_has_nothing_before_it(connect: Connect) -> None:
    async def run() -> list[TokenScore]:
        async with connect() as engine:
            return await engine.score([1], top=5)

    assert asyncio.run(run()) == [TokenScore(1, "<|im_start|>", b"<|im_start|>", None, ())]


def test_a_prompt_may_fill_the_context_and_its_last_token_lie_behind_it(
    connect: Connect, tiny_model: Callable[[str], Path]
) -> None:
    tokens = [1, *range(100, 612)]
    before = oracle(tiny_model("gqa"), tokens[:-1])

    async def run() -> list[TokenScore]:
        async with connect() as engine:
            return await engine.score(tokens)

    assert len(tokens) == 513
    assert_scores(asyncio.run(run())[1:], tokens[1:], before, 0, atol=5e-4)


def test_sampled_tokens_are_scored_before_temperature_and_all_else(
    connect: Connect, tiny_model: Callable[[str], Path]
) -> None:
    async def run() -> tuple[asynctsqp.Completion, ...]:
        async with connect() as engine:
            none, bare, some = [await engine.complete(PROMPT, logprobs=n, **WARM) for n in (None, 0, 3)]
            return none, bare, some

    none, bare, some = asyncio.run(run())
    assert none.logprobs is None
    assert none.token_ids == bare.token_ids == some.token_ids, "looking changes nothing"
    before = oracle(tiny_model("gqa"), PROMPT + some.token_ids)[len(PROMPT) - 1 : -1]
    for done, top in ((bare, 0), (some, 3)):
        assert done.logprobs is not None
        assert_scores(done.logprobs, done.token_ids, before, top, atol=2e-4)


def test_every_piece_has_its_score_and_the_last_one_too(connect: Connect) -> None:
    async def run() -> tuple[list[asynctsqp.Piece], list[asynctsqp.Piece]]:
        async with connect() as engine:
            scored = [piece async for piece in engine.generate(PROMPT, logprobs=1, **WARM)]
            plain = [piece async for piece in engine.generate(PROMPT, **WARM)]
            return scored, plain

    scored, plain = asyncio.run(run())
    assert [piece.text for piece in scored] == [piece.text for piece in plain]
    assert [piece.logprobs and piece.logprobs.token_id for piece in scored] == [piece.token_id for piece in plain]
    assert {piece.logprobs for piece in plain} == {None}


def test_the_likeliest_token_is_the_greedy_one(connect: Connect) -> None:
    async def run() -> tuple[asynctsqp.Completion, list[TokenScore]]:
        async with connect() as engine:
            done = await engine.complete(PROMPT, temperature=0, max_new_tokens=16, ignore_eos=True, logprobs=1)
            return done, await engine.score(PROMPT + done.token_ids, top=1)

    done, scores = asyncio.run(run())
    assert done.logprobs is not None
    for sampled, score in zip(done.logprobs, scores[len(PROMPT) :], strict=True):
        assert sampled.top[0] == Alternative(sampled.token_id, sampled.text, sampled.data, sampled.logprob or 0.0)
        assert score.token_id == score.top[0].token_id == sampled.token_id
        assert score.logprob == pytest.approx(sampled.logprob, abs=1e-4)


def test_who_does_not_ask_pays_nothing(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with connect() as engine:
            await engine.complete(PROMPT, max_new_tokens=2)
            with pytest.raises(asynctsqp.AsynctsqpError):
                await engine.complete(PROMPT, max_new_tokens=2, logprobs=0)

    monkeypatch.delattr(Scorer, "score")
    asyncio.run(run())


@pytest.mark.parametrize("number", [-1, 21, 1.0, True, "3", [1]])
def test_a_bad_number_of_alternatives_is_refused(number: Any, connect: Connect) -> None:
    async def run() -> None:
        async with connect() as engine:
            with pytest.raises(BadInputError, match="0 to 20 alternatives"):
                await engine.complete(PROMPT, logprobs=number)
            with pytest.raises(BadInputError, match="0 to 20 alternatives"):
                await engine.score(PROMPT, top=number)
            await nothing_held(engine)

    asyncio.run(run())


@pytest.mark.parametrize("prompt", ["", [], [49152], [1] * 514, None], ids=str)
def test_a_bad_prompt_is_refused(prompt: Any, connect: Connect) -> None:
    async def run() -> None:
        async with connect() as engine:
            with pytest.raises(BadInputError):
                await engine.score(prompt)
            await nothing_held(engine)

    asyncio.run(run())


def test_who_leaves_early_holds_nothing(connect: Connect) -> None:
    async def run() -> None:
        async with connect(chunk_tokens=16) as engine:
            whole = await engine.score(PROMPT, top=2)
            task = asyncio.create_task(engine.score(LONG))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await nothing_held(engine)
            assert await engine.score(PROMPT, top=2) == whole

    asyncio.run(run())


def test_scores_that_are_no_numbers_are_refused() -> None:
    async def run() -> None:
        scoring: Scoring[torch.Tensor] = Scoring(None, 2, lambda first, rows: rows)  # type: ignore[arg-type]
        scoring.accept(0, np.zeros((1, 4), np.float32))
        with pytest.raises(ProtocolError):
            scoring.accept(1, np.array([[0, np.nan, 0, 0]], np.float32))

    asyncio.run(run())


def test_a_prompts_scores_are_never_held_all_at_once(tiny_model: Callable[[str], Path], tiny_gpu: GpuProcess) -> None:
    """500 tokens' scores are 98 MB; `logits` must hold them, which shows that the measurement sees them."""
    command = [sys.executable, "-m", "tests.scoring_peaks", str(tiny_model("gqa")), tiny_gpu.endpoint]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=True)
    scored, logits = map(int, done.stdout.split())
    print(f"501 tokens: {scored >> 20} MiB for log-probabilities, {logits >> 20} MiB for logits")
    assert scored < 40 << 20 < 90 << 20 < logits


@given(text=st.text(min_size=1, max_size=40))
@settings(deadline=None, max_examples=100)
def test_bytes_of_a_byte_level_vocabulary(text: str) -> None:
    data = TokenBytes(LLAMA_3).of
    assert b"".join(data(token) for token in LLAMA_3.encode(text, add_special_tokens=False)) == text.encode()


@given(text=st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\u2581"), min_size=1, max_size=40))
@settings(deadline=None, max_examples=100)
def test_bytes_of_a_sentencepiece_vocabulary(text: str) -> None:
    data = TokenBytes(LLAMA_2).of
    tokens = LLAMA_2.encode(text, add_special_tokens=False)
    assert b"".join(data(token) for token in tokens) == b" " + text.encode()


def test_bytes_of_added_and_of_missing_tokens() -> None:
    for tokenizer in (LLAMA_2, LLAMA_3):
        data = TokenBytes(tokenizer).of
        added = tokenizer.convert_tokens_to_ids("<|a b Ġ\u2581|>")
        assert data(added) == "<|a b Ġ\u2581|>".encode()
        assert data(len(tokenizer) + 5) == b""


def byte_level() -> PreTrainedTokenizerFast:
    """As Llama 3's: the random model's, of bytes and nothing else."""
    directory = Path(asynctsqp.__file__).parent / "random_models" / "llama-3.2-1b"
    return PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2's: pieces with a sign for spaces, and bytes for what is no piece."""
    vocabulary = {piece: place for place, piece in enumerate(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))])}
    for piece in ["\u2581", *"abcdefgh", "ab", "\u2581a", "é", "\u2581ab"]:
        vocabulary[piece] = len(vocabulary)
    merges = [("a", "b"), ("\u2581", "a"), ("\u2581a", "b")]
    raw = RawTokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw)


LLAMA_3, LLAMA_2 = byte_level(), sentencepiece()
for _tokenizer in (LLAMA_2, LLAMA_3):
    _tokenizer.add_tokens(["<|a b Ġ\u2581|>"])
