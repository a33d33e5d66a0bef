"""What an answer says: its text, where it ends, its counts."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from asynctsqp import Completion, Engine, Piece
from tests.conftest import GpuProcess

PROMPT = [1, *range(100, 140)]
LAYERS, CONTEXT = 3, 512  # of the tiny model `gqa`


@pytest.fixture
def ask(tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]) -> Callable[..., list[Completion]]:
    """ask({sampling}, ..., **options) -> the completions of PROMPT, one after another, on one engine."""

    def ask(*samplings: dict[str, Any], **options: Any) -> list[Completion]:
        async def run() -> list[Completion]:
            async with Engine.connect(tiny_model("gqa"), tiny_gpu.endpoint, **options) as engine:
                return [await engine.complete(**{"prompt": PROMPT} | sampling) for sampling in samplings]

        return asyncio.run(run())

    return ask


@pytest.fixture
def decode(tiny_model: Callable[[str], Path]) -> Callable[[list[int]], str]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("gqa"))
    return lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True))


def test_pieces_add_up_to_the_answer(
    tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path], decode: Callable[[list[int]], str]
) -> None:
    sampling = {"max_new_tokens": 60, "temperature": 1.5, "seed": 3, "ignore_eos": True}

    async def run() -> tuple[list[Piece], Completion]:
        async with Engine.connect(tiny_model("gqa"), tiny_gpu.endpoint) as engine:
            pieces = [piece async for piece in engine.generate(PROMPT, **sampling)]
            return pieces, await engine.complete(PROMPT, **sampling)

    pieces, done = asyncio.run(run())
    assert [piece.token_id for piece in pieces] == done.token_ids
    assert "".join(piece.text for piece in pieces) == done.text == decode(done.token_ids)
    assert [piece.finish_reason for piece in pieces] == [None] * 59 + ["length"]


def test_counts_and_times(ask: Callable[..., list[Completion]]) -> None:
    one, ten = ask({"max_new_tokens": 1}, {"max_new_tokens": 10, "ignore_eos": True}, lanes=1)
    assert one.rpc.calls == 4 * LAYERS + 1
    assert ten.rpc.calls == 10 * (4 * LAYERS + 1)
    assert (one.prompt_tokens, one.completion_tokens) == (len(PROMPT), 1)
    assert (ten.prompt_tokens, ten.completion_tokens) == (len(PROMPT), 10)
    rows = len(PROMPT)
    rest = (LAYERS - 1) * rows + 1  # o, gate+up and down: of the last layer's only the sampled row
    sent = LAYERS * rows * 64 + rest * (64 + 64 + 176) + 64
    received = LAYERS * rows * (64 + 2 * 32) + rest * (64 + 2 * 176 + 64) + 49152
    assert (one.rpc.bytes_sent, one.rpc.bytes_received) == (4 * sent, 4 * received)
    assert one.timing.decode_s == one.timing.ms_per_token == 0
    assert 0 < one.rpc.wait_s < one.timing.prefill_s
    assert one.timing.load_s > 0
    assert ten.timing.ms_per_token == pytest.approx(1e3 * ten.timing.decode_s / 9)


def test_an_answer_ends_with_the_context(ask: Callable[..., list[Completion]]) -> None:
    full, nearly = ask(
        {"prompt": [1] * (CONTEXT - 1), "max_new_tokens": 100, "ignore_eos": True},
        {"prompt": [1] * (CONTEXT - 5), "ignore_eos": True},
    )
    assert (full.completion_tokens, full.finish_reason) == (1, "length")
    assert (nearly.completion_tokens, nearly.finish_reason) == (5, "length")


def test_a_seed_makes_an_answer_again(ask: Callable[..., list[Completion]]) -> None:
    warm = {"max_new_tokens": 24, "temperature": 1.0, "ignore_eos": True}
    first, again, other, unseeded, unseeded_again = ask(
        warm | {"seed": 7}, warm | {"seed": 7}, warm | {"seed": 8}, warm, warm
    )
    assert first.token_ids == again.token_ids
    assert first.token_ids != other.token_ids
    assert unseeded.token_ids != unseeded_again.token_ids


def test_the_coldest_answers_are_greedy(ask: Callable[..., list[Completion]]) -> None:
    base = {"max_new_tokens": 24, "ignore_eos": True}
    greedy, one_k, tiny_p, cold = ask(
        base | {"temperature": 0},
        base | {"temperature": 1.0, "top_k": 1},
        base | {"temperature": 1.0, "top_p": 1e-9},
        base | {"temperature": 1e-30},
    )
    assert one_k.token_ids == tiny_p.token_ids == cold.token_ids == greedy.token_ids


def test_end_of_sequence(
    ask: Callable[..., list[Completion]],
    tiny_gpu: GpuProcess,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    decode: Callable[[list[int]], str],
) -> None:
    """The ends are the generation config's; here two of the tokens that the model is about to choose."""
    greedy = {"max_new_tokens": 24, "temperature": 0}
    (whole,) = ask(greedy | {"ignore_eos": True})
    first = min(whole.token_ids.index(token) for token in whole.token_ids[6:8])
    model = Path(shutil.copytree(tiny_model("gqa"), tmp_path / "model"))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": whole.token_ids[6:8]}))

    async def run() -> list[Completion]:
        async with Engine.connect(model, tiny_gpu.endpoint) as engine:
            return [await engine.complete(PROMPT, **greedy, ignore_eos=ignore) for ignore in (False, True)]

    ended, ignoring = asyncio.run(run())
    assert ended.finish_reason == "stop"
    assert ended.token_ids == whole.token_ids[: first + 1], "the end itself is the last token"
    assert ended.text == decode(whole.token_ids[:first]), "and has no text"
    assert (ignoring.completion_tokens, ignoring.finish_reason) == (24, "length")
    assert not set(ignoring.token_ids) & set(whole.token_ids[6:8])


def test_stop_strings_cut_the_text_and_end_the_answer(
    ask: Callable[..., list[Completion]], decode: Callable[[list[int]], str]
) -> None:
    base = {"max_new_tokens": 40, "temperature": 0, "ignore_eos": True}
    (whole,) = ask(base)
    lengths = [len(decode(whole.token_ids[:count])) for count in range(41)]
    border = lengths[8]  # characters before the ninth token: a stop around it lies across two tokens
    across, early, late = whole.text[border - 2 : border + 2], whole.text[5:8], whole.text[-3:]
    for stops in ([across], [late, across, early], across, (late,)):
        (done,) = ask(base | {"stop": stops})
        places = [whole.text.find(stop) for stop in ([stops] if isinstance(stops, str) else stops)]
        assert done.text == whole.text[: min(places)]
        assert done.finish_reason == "stop"
        assert done.token_ids == whole.token_ids[: len(done.token_ids)]
        assert lengths[len(done.token_ids)] > min(places), "it did not end before the stop had come"


def test_a_stop_string_that_never_comes_changes_nothing(ask: Callable[..., list[Completion]]) -> None:
    base = {"max_new_tokens": 40, "temperature": 0, "ignore_eos": True}
    (whole,) = ask(base)
    nearly = whole.text[-4:] + "\0"  # the text ends with its beginning
    (done,) = ask(base | {"stop": [nearly, "\0\0"]})
    assert (done.text, done.token_ids, done.finish_reason) == (whole.text, whole.token_ids, "length")
