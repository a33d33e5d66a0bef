"""Log-probabilities in the two forms of OpenAI's API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from asynctsqp.engine import Alternative, TokenScore


def for_chat(scores: Sequence[TokenScore]) -> dict[str, Any]:
    content = [_entry(score) | {"top_logprobs": [_entry(one) for one in score.top]} for score in scores]
    return {"content": content, "refusal": None}


def for_text(scores: Sequence[TokenScore], offset: int) -> dict[str, Any]:
    """offset: characters of the tokens before these."""
    offsets = []
    for score in scores:
        offsets.append(offset)
        offset += len(score.text)
    return {
        "tokens": [_label(score) for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [_alternatives(score) for score in scores],
        "text_offset": offsets,
    }


def _entry(token: TokenScore | Alternative) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.data)}


def _alternatives(score: TokenScore) -> dict[str, float] | None:
    """Of tokens with the same label the likeliest; the token that came is always there, as OpenAI has it."""
    if score.logprob is None:
        return None
    found = {_label(score): score.logprob}
    for one in reversed(score.top):
        found[_label(one)] = max(one.logprob, found.get(_label(one), one.logprob))
    return dict(sorted(found.items(), key=lambda entry: -entry[1]))


def _label(token: TokenScore | Alternative) -> str:
    """The text, or its bytes where they are no text by themselves."""
    try:
        return token.data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.data)
