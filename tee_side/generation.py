"""One request from its first scores to its last token: samples, turns tokens into text, hands pieces over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Generic, TypeVar

import numpy as np
import torch

from asynctsqp.errors import ProtocolError
from tee_side.arrays import Rows
from tee_side.enclave import RunningSequence
from tee_side.request import Piece, Progress, RpcTotals
from tee_side.sampler import Sampler
from tee_side.scores import Scorer, TokenScore
from tee_side.tokenizer import TextStream

Part = TypeVar("Part")


class Generation:
    """An answer that is being made (batches.Request)."""

    def __init__(
        self,
        sequence: RunningSequence,
        sampler: Sampler,
        text: TextStream,
        prompt: Sequence[int],
        most: int,
        end: frozenset[int],
        progress: Progress,
        scorer: Scorer | None,
    ) -> None:
        self.sequence = sequence
        self._sampler = sampler
        self._text = text
        self._tokens = list(prompt)
        self._most = most
        self._end = end
        self._progress = progress
        self._scorer = scorer  # None: nobody wants log-probabilities
        self._since = time.perf_counter()
        self._arrived: asyncio.Queue[Piece | Exception] = asyncio.Queue()

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """As they come. Raises what the request failed with."""
        while True:
            piece = await self._arrived.get()
            if isinstance(piece, Exception):
                raise piece
            yield piece
            if piece.finish_reason is not None:
                return

    def account(self, totals: RpcTotals, share: float) -> None:
        self._progress.rpc.add(totals, share)

    def accept(self, first: int, scores: Rows) -> int | None:
        _check(scores)
        token = self._sampler.choose(scores[0], self._tokens)
        score = None if self._scorer is None else self._scorer.score(torch.from_numpy(scores), [token])[0]
        self._tokens.append(token)
        self._progress.token_came(time.perf_counter() - self._since)
        self._since = time.perf_counter()
        piece = self._piece(token, score)
        self._arrived.put_nowait(piece)
        return token if piece.finish_reason is None else None

    def fail(self, error: Exception) -> None:
        self._arrived.put_nowait(error)

    def _piece(self, token: int, score: TokenScore | None) -> Piece:
        ended = token in self._end
        certain = "" if ended else self._text.push(token)
        if ended or self._text.stopped or self._progress.completion_tokens == self._most:
            reason = "stop" if ended or self._text.stopped else "length"
            return Piece(certain + self._text.finish(), token, reason, score)
        return Piece(certain, token, None, score)


class Scoring(Generic[Part]):
    """What is wanted of the scores after each token of a prompt (batches.Request)."""

    def __init__(self, sequence: RunningSequence, tokens: int, keep: Callable[[int, torch.Tensor], Part]) -> None:
        """keep: (place of a chunk's first token, scores [n, vocab] after each of its tokens) -> what stays of them."""
        self.sequence = sequence
        self._missing = tokens
        self._keep = keep
        self._parts: dict[int, Part] = {}
        self.parts: asyncio.Future[list[Part]] = asyncio.get_running_loop().create_future()  # in the prompt's order

    def account(self, totals: RpcTotals, share: float) -> None:
        pass

    def accept(self, first: int, scores: Rows) -> None:
        _check(scores)
        self._parts[first] = self._keep(first, torch.from_numpy(scores))
        self._missing -= len(scores)
        if not self._missing and not self.parts.done():
            # lanes may overtake each other at the end
            self.parts.set_result([self._parts[first] for first in sorted(self._parts)])

    def fail(self, error: Exception) -> None:
        if not self.parts.done():
            self.parts.set_exception(error)


def _check(scores: Rows) -> None:
    if not np.isfinite(scores).all():
        raise ProtocolError("the scores are not finite: the GPU side is broken, or float16 overflowed")
