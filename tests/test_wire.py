"""What the GPU side sees under `full`: uniform words, the same for every prompt.

Each test has its twin: what is not masked, or masked wrongly, fails it at once.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from asynctsqp import Engine
from asynctsqp.key_stream import KeyStream
from tests.meddling_gpu import MeddlingGpu, meddling_gpu
from tests.uniformity import FALSE_ALARM, WORDS, uniformity

TEXT = "The old lighthouse keeper wrote in his journal that the sea had been calm for eleven days. " * 8


def overhear(gpu: MeddlingGpu) -> list[np.ndarray]:
    """-> a list that fills with what each call sends, [rows, width]."""
    sent = list[np.ndarray]()
    gpu.meddle = lambda op, layer, x, y: sent.append(x.numpy().copy())
    return sent


def all_sent(gpu: MeddlingGpu, model: Path, tokens: list[int], **options: Any) -> np.ndarray:
    """Every word of one pass over the tokens."""

    async def work() -> None:
        async with Engine.connect(model, gpu.endpoint, **options) as engine:
            await engine.complete(tokens, max_new_tokens=1, temperature=0)

    sent = overhear(gpu)
    asyncio.run(work())
    return np.concatenate([x.ravel() for x in sent])


def test_ten_million_words_are_uniform(demo_model: Path) -> None:
    """Of real text through the demo model. False alarm: 10^-6."""
    tokens = AutoTokenizer.from_pretrained(demo_model).encode(TEXT)[:110]
    with meddling_gpu(demo_model) as gpu:
        words = all_sent(gpu, demo_model, tokens, protect="full")
    assert words.dtype == np.int32
    assert words.size >= WORDS
    assert uniformity(words) > FALSE_ALARM


def reused(stream: KeyStream, words: int) -> int:
    """A key stream that hands out the same range to everybody."""
    return 0


def seven_bits_a_byte(stream: KeyStream, address: int, shape: tuple[int, int]) -> np.ndarray:
    return right_words(stream, address, shape) & np.int32(0x7F7F7F7F)


right_words = KeyStream.words


@pytest.mark.parametrize("wrong", [{"take": reused}, {"words": seven_bits_a_byte}], ids=["reused", "not uniform"])
def test_wrong_pads_are_not_uniform(
    wrong: dict[str, Any], meddling: MeddlingGpu, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin, on one twentieth of the words: right pads pass there, and the same tests see wrong ones at once."""
    tokens = [1, *range(1000, 1450)]
    model = tiny_model("gqa")
    assert uniformity(all_sent(meddling, model, tokens, protect="full")) > FALSE_ALARM
    assert uniformity(all_sent(meddling, model, tokens, protect="verify")) < 1e-30
    for name, replacement in wrong.items():
        monkeypatch.setattr(KeyStream, name, replacement)
    assert uniformity(all_sent(meddling, model, tokens, protect="full")) < 1e-30


ONE, OTHER = [1, *range(100, 107)], [1, *range(900, 907)]  # two prompts of the same length: lengths are not hidden
TRAINED, ASKED = 120, 160


def passes(gpu: MeddlingGpu, model: Path, protect: str) -> tuple[np.ndarray, np.ndarray]:
    """-> one row for each pass over one of the prompts, by chance: all that was sent; and which it was, -1 or 1."""
    chance = random.Random(4)
    labels = [chance.choice((-1, 1)) for _ in range(TRAINED + ASKED)]
    rows = list[np.ndarray]()

    async def work() -> None:
        async with Engine.connect(model, gpu.endpoint, protect=protect) as engine:
            for label in labels:
                sent = overhear(gpu)
                await engine.complete(ONE if label < 0 else OTHER, max_new_tokens=1, temperature=0)
                rows.append(np.concatenate([x.ravel() for x in sent]))

    asyncio.run(work())
    return np.stack(rows), np.array(labels)


def guessed_right(features: np.ndarray, labels: np.ndarray) -> int:
    """How many of the last ASKED a ridge classifier guesses that was trained on those before (Hoerl, Kennard 1970).

    In its dual form, since there are more features than samples: w = X^T (X X^T + l I)^-1 labels.
    """
    spread = features[:TRAINED].std(axis=0) + 1e-12
    x = (features - features[:TRAINED].mean(axis=0)) / spread
    known, asked = x[:TRAINED], x[TRAINED:]
    gram = known @ known.T
    dual = np.linalg.solve(gram + 0.1 * np.trace(gram) / TRAINED * np.eye(TRAINED), labels[:TRAINED].astype(float))
    return int((np.sign(asked @ (known.T @ dual)) == labels[TRAINED:]).sum())


def binomial_interval(count: int, false_alarm: float) -> tuple[int, int]:
    """The widest middle outside which a fair coin's number of heads lies with at most this probability; exact."""
    tail, low = 0.0, 0
    while (tail := tail + math.comb(count, low) * 0.5**count) <= false_alarm / 2:
        low += 1
    return low, count - low


def test_two_prompts_cannot_be_told_apart(meddling: MeddlingGpu, tiny_model: Callable[[str], Path]) -> None:
    """Neither by the words' values, nor by the bits of the first call, which is the prompt's embedding and no more.

    False alarm: 10^-6 each. The same classifier tells them apart without one mistake where they are not masked.
    """
    model = tiny_model("gqa")
    low, high = binomial_interval(ASKED, FALSE_ALARM)
    words, labels = passes(meddling, model, "full")
    first = np.ascontiguousarray(words[:, : len(ONE) * 64])
    bits = np.unpackbits(first.view(np.uint8).reshape(len(first), -1), axis=1)
    assert low <= guessed_right(words / 2.0**31, labels) <= high
    assert low <= guessed_right(bits.astype(np.float64), labels) <= high
    assert high < 0.75 * ASKED, "the interval says nothing"
    bare, labels = passes(meddling, model, "none")
    assert guessed_right(bare.astype(np.float64), labels) == ASKED
