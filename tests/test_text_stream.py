"""Text that is streamed token by token: no character is ever split, nothing is lost, stops are cut off."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asynctsqp.model_spec import ModelSpec
from tee_side.tokenizer import TextStream, Tokenizer

TEXTS = [
    "plain words, one after another",
    "東京の夜は静かです。漢字とかな。",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈 flag 🇫🇷 and 👍🏽",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𒀀𒀁𒀂 ꧁꧂",
    "é vs é, Ǻ, ﷽, Z̷̢̛a̸l̶g̷o̴",
    "नमस्ते दुनिया, สวัสดีชาวโลก, გამარჯობა",
    "tabs\tand\nnewlines\r\n  and   spaces ",
    "a literal � stays",
]


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Tokenizer:
    return Tokenizer(demo_model, ModelSpec.read(demo_model / "config.json").vocab_size)


def stream(tokenizer: Tokenizer, tokens: list[int], stop: tuple[str, ...] = (), prompt: str = "Say:") -> list[str]:
    text = TextStream(tokenizer, tokenizer.encode(prompt), stop)
    pieces = []
    for token in tokens:
        pieces.append(text.push(token))
        if text.stopped:
            break
    return [*pieces, text.finish()]


def bytewise(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a text, where every character beyond ASCII is as many tokens as it has bytes, if possible."""
    return [token for character in text for token in tokenizer.encode(character)]


@pytest.mark.parametrize("text", TEXTS)
def test_no_character_is_split(text: str, tokenizer: Tokenizer) -> None:
    for tokens in (tokenizer.encode(text), bytewise(tokenizer, text)):
        pieces = stream(tokenizer, tokens)
        assert "".join(pieces) == text
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)


@given(text=st.text(min_size=1, max_size=40))
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_comes_through(text: str, tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("." + text)  # some characters are no token of this model at all
    assert "".join(stream(tokenizer, tokens)) == tokenizer.decode(tokens)


@given(tokens=st.lists(st.integers(0, 49151), min_size=1, max_size=40))
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_tokens_come_through(tokens: list[int], tokenizer: Tokenizer) -> None:
    """Also broken bytes and special tokens, as a model may sample them."""
    assert "".join(stream(tokenizer, tokens)) == tokenizer.decode(tokens)


LETTERS = "abc é漢"


@given(text=st.text(LETTERS, min_size=1, max_size=30), stop=st.text(LETTERS, min_size=1, max_size=5))
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_text_ends_before_its_stop(text: str, stop: str, tokenizer: Tokenizer) -> None:
    assert "".join(stream(tokenizer, bytewise(tokenizer, text), (stop,))) == text.partition(stop)[0]


@given(
    text=st.text(LETTERS, min_size=1, max_size=30),
    stops=st.lists(st.text(LETTERS, min_size=1, max_size=5), min_size=1, max_size=3),
)
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_text_ends_before_the_first_of_several_stops(text: str, stops: list[str], tokenizer: Tokenizer) -> None:
    """The first to be complete, that is: no later text is waited for."""
    shown = "".join(stream(tokenizer, bytewise(tokenizer, text), tuple(stops)))
    assert not any(stop in shown for stop in stops)
    if any(stop in text for stop in stops):
        assert any(text.startswith(shown + stop) for stop in stops)
    else:
        assert shown == text


def test_what_is_certain_is_not_held_back(tokenizer: Tokenizer) -> None:
    """Every plain token shows at once: a stream that waits is no stream."""
    tokens = tokenizer.encode("the quick brown fox jumps over the lazy dog")
    *pieces, last = stream(tokenizer, tokens)
    assert all(pieces)
    assert last == ""


def test_a_character_that_never_ends_is_told_at_the_end(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("🌃")[:-1]
    assert "".join(stream(tokenizer, tokens)) == tokenizer.decode(tokens)
