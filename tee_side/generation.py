"""One request from its first scores to its last token: samples, turns tokens into text, hands pieces over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence

import torch

from asynctsqp.errors import ProtocolError
from tee_side.enclave import RunningSequence
from tee_side.request import Piece, Progress, RpcTotals
from tee_side.sampler import Sampler
from tee_side.tokenizer import TextStream


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
    ) -> None:
        self.sequence = sequence
        self._sampler = sampler
        self._text = text
        self._tokens = list(prompt)
        self._most = most
        self._end = end
        self._progress = progress
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

    def accept(self, first: int, scores: torch.Tensor) -> int | None:
        if not scores.isfinite().all():
            raise ProtocolError("the scores are not finite: the GPU side is broken, or float16 overflowed")
        token = self._sampler.choose(scores[0], self._tokens)
        self._tokens.append(token)
        self._progress.token_came(time.perf_counter() - self._since)
        self._since = time.perf_counter()
        piece = self._piece(token)
        self._arrived.put_nowait(piece)
        return token if piece.finish_reason is None else None

    def fail(self, error: Exception) -> None:
        self._arrived.put_nowait(error)

    def _piece(self, token: int) -> Piece:
        ended = token in self._end
        certain = "" if ended else self._text.push(token)
        if ended or self._text.stopped or self._progress.completion_tokens == self._most:
            reason = "stop" if ended or self._text.stopped else "length"
            return Piece(certain + self._text.finish(), token, reason)
        return Piece(certain, token)


class Scoring:
    """The scores after each token of a prompt (batches.Request)."""

    def __init__(self, sequence: RunningSequence, tokens: int) -> None:
        self.sequence = sequence
        self._missing = tokens
        self._parts: dict[int, torch.Tensor] = {}
        self.scores: asyncio.Future[torch.Tensor] = asyncio.get_running_loop().create_future()

    def account(self, totals: RpcTotals, share: float) -> None:
        pass

    def accept(self, first: int, scores: torch.Tensor) -> None:
        self._parts[first] = scores
        self._missing -= len(scores)
        if not self._missing and not self.scores.done():
            parts = [self._parts[first] for first in sorted(self._parts)]  # lanes may overtake each other at the end
            self.scores.set_result(parts[0] if len(parts) == 1 else torch.cat(parts))

    def fail(self, error: Exception) -> None:
        if not self.scores.done():
            self.scores.set_exception(error)
