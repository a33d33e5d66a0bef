"""How likely tokens were: log-probabilities out of a model's scores.

They are log softmax(scores) of the scores as the model gave them: before temperature, top-k, top-p, penalties and
forbidden tokens. The OpenAI-compatible servers report these, and evaluations add them up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from asynctsqp.errors import BadInputError

MOST_ALTERNATIVES = 20


@dataclass(frozen=True)
class Alternative:
    """A token that might have come at a place."""

    token_id: int
    text: str  # of this token alone: bytes that are no whole character show as U+FFFD
    data: bytes  # what it stands for, exactly
    logprob: float  # natural logarithm


@dataclass(frozen=True)
class TokenScore:
    """A token that did come, and the likeliest ones at its place."""

    token_id: int
    text: str  # as of an Alternative
    data: bytes
    logprob: float | None  # None: nothing came before it
    top: tuple[Alternative, ...]  # likeliest first


class Scorer:
    """Scores tokens, with a number of alternatives to each."""

    def __init__(self, bytes_of: Callable[[int], bytes], top: int) -> None:
        """Raises BadInputError for a number that is not from 0 to MOST_ALTERNATIVES."""
        if not isinstance(top, int) or isinstance(top, bool) or not 0 <= top <= MOST_ALTERNATIVES:
            raise BadInputError(f"log-probabilities come with 0 to {MOST_ALTERNATIVES} alternatives, not {top!r}")
        self._bytes_of = bytes_of
        self._top = top

    def first(self, token: int) -> TokenScore:
        """A prompt's first token."""
        data = self._bytes_of(token)
        return TokenScore(token, _text(data), data, None, ())

    def score(self, rows: torch.Tensor, tokens: Sequence[int]) -> list[TokenScore]:
        """rows: [n, vocab] scores before each of n tokens."""
        total = rows.logsumexp(1, keepdim=True)
        chosen = rows.gather(1, torch.tensor(tokens).unsqueeze(1)) - total
        values, ids = rows.topk(min(self._top, rows.shape[1]), dim=1)
        tops = zip(ids.tolist(), (values - total).tolist(), strict=True)
        return [
            self._token_score(token, logprob, top)
            for token, [logprob], top in zip(tokens, chosen.tolist(), tops, strict=True)
        ]

    def _token_score(self, token: int, logprob: float, top: tuple[list[int], list[float]]) -> TokenScore:
        data = self._bytes_of(token)
        alternatives = tuple(self._alternative(*pair) for pair in zip(*top, strict=True))
        return TokenScore(token, _text(data), data, logprob, alternatives)

    def _alternative(self, token: int, logprob: float) -> Alternative:
        data = self._bytes_of(token)
        return Alternative(token, _text(data), data, logprob)


def _text(data: bytes) -> str:
    return data.decode(errors="replace")
