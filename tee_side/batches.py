"""Runs what the scheduler puts together: one worker a lane, one micro-batch after another on each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from asynctsqp.errors import AsynctsqpError, one_line
from tee_side.arrays import Rows, Tokens
from tee_side.enclave import RunningSequence
from tee_side.lanes import Lane
from tee_side.link import Link
from tee_side.meter import Meter
from tee_side.model import Model
from tee_side.offload import Note, Offload
from tee_side.request import RpcTotals
from tee_side.scheduler import Portion, Scheduler
from tee_side.seals import Sealer


class Request(Protocol):
    """Somebody who waits for scores. None of these may block: they run between two steps of everybody."""

    sequence: RunningSequence

    def account(self, totals: RpcTotals, share: float) -> None:
        """What a pass cost that this request had a share of, by rows."""

    def accept(self, first: int, scores: Rows) -> int | None:
        """Wanted scores of the portion that begins with this token, [n, vocab] -> the token that is next.

        None: there is none, now or ever.
        """

    def fail(self, error: Exception) -> None:
        """There will be no more scores."""


@dataclass(eq=False)
class _Flight:
    """One micro-batch on its lane."""

    batch: Sequence[Portion[Request]]
    worker: asyncio.Task[None]
    left: bool = False  # nobody waits for any of it

    def leave(self) -> None:
        if not self.left:
            self.left = True
            self.worker.cancel()


class Batches:
    """All requests of one engine on their way. Make it in a running loop, end it with `close`."""

    def __init__(
        self,
        scheduler: Scheduler[Request],
        model: Model,
        link: Link,
        sealer: Sealer,
        lanes: Sequence[Lane],
        note: Note | None,
        meter: Meter,
    ) -> None:
        self._scheduler = scheduler
        self._model = model
        self._link = link
        self._sealer = sealer
        self._note = note
        self._meter = meter
        self.failure: AsynctsqpError | None = None  # of our own, which ends all requests now and later
        self._work = asyncio.Event()
        self._flights: set[_Flight] = set()
        self._workers = {lane: asyncio.create_task(self._serve(lane)) for lane in lanes}

    @property
    def idle(self) -> bool:
        """Whether nothing is on its way."""
        return not self._flights and all(lane.idle for lane in self._workers)

    def submit(self, request: Request, prompt: Sequence[int], every: bool) -> None:
        """every: the scores after each token are wanted, and nothing else. Raises what this engine failed with."""
        if self.failure is not None:
            raise self.failure.again()
        self._scheduler.add(request, prompt, every)
        self._work.set()

    def leave(self, request: Request) -> None:
        """Nobody waits for it any more. A pass that is left by all ends at once."""
        self._scheduler.remove(request)
        for flight in self._flights:
            if all(not self._scheduler.has(portion.request) for portion in flight.batch):
                flight.leave()

    def close(self) -> None:
        for worker in self._workers.values():
            worker.cancel()

    async def _serve(self, lane: Lane) -> None:
        try:
            while True:
                if batch := self._scheduler.next():
                    await self._run(batch, lane)
                else:
                    self._work.clear()
                    await self._work.wait()
        except Exception as error:  # a defect of ours: nobody is to wait for ever
            self.failure = _as_ours(error)
            for request in self._scheduler.running:
                self._fail(request, self.failure)

    async def _run(self, batch: Sequence[Portion[Request]], lane: Lane) -> None:
        """The pass begins at once, in the worker itself: what the last one has brought is handed over meanwhile."""
        totals = RpcTotals()
        began_at = time.perf_counter()
        try:
            forward = self._begin(batch, lane, totals)
        except Exception as error:  # no memory for keys and values, say
            self._ground(batch, error)
            return
        flight = _Flight(batch, self._workers[lane])
        self._flights.add(flight)
        outcome: Rows | Exception | None = None
        try:
            outcome = await forward
        except asyncio.CancelledError:
            if not flight.left or flight.worker.uncancel():  # what is still asked for is that all ends
                raise
        except Exception as error:
            outcome = error
        finally:
            self._flights.discard(flight)
            self._scheduler.done(batch)
            self._work.set()
        failure = outcome if isinstance(outcome, Exception) else None
        self._meter.passed(totals, time.perf_counter() - began_at, failure)
        if outcome is not None:
            self._finish(batch, outcome, totals)

    def _begin(self, batch: Sequence[Portion[Request]], lane: Lane, totals: RpcTotals) -> Coroutine[Any, Any, Rows]:
        parts = [(portion.request.sequence, len(portion.tokens)) for portion in batch]
        tee = self._model.begin(parts, _wanted(batch), lane.index)
        tokens = np.array([token for portion in batch for token in portion.tokens], np.int64)
        gpu = Offload(self._link, lane, self._sealer, totals, self._note, self._meter)
        return self._model.forward(tee, gpu, tokens)

    def _ground(self, batch: Sequence[Portion[Request]], error: Exception) -> None:
        """A micro-batch that cannot begin."""
        for portion in batch:
            portion.request.sequence.cache.fail(error)
            self._fail(portion.request, error)
        self._scheduler.done(batch)

    def _finish(self, batch: Sequence[Portion[Request]], outcome: Rows | Exception, totals: RpcTotals) -> None:
        """outcome: the wanted scores of all, or what the pass has failed with."""
        rows = sum(len(portion.tokens) for portion in batch)
        start = 0
        for portion in batch:
            portion.request.account(totals, len(portion.tokens) / rows)
            end = start + _wanted_rows(portion)
            if isinstance(outcome, Exception):
                self._fail(portion.request, outcome)
            elif failure := portion.request.sequence.cache.failure:
                self._fail(portion.request, failure)
            elif end > start:
                self._accept(portion, outcome[start:end])
            start = end

    def _accept(self, portion: Portion[Request], scores: Rows) -> None:
        if not self._scheduler.has(portion.request):
            return
        try:
            token = portion.request.accept(portion.first, scores)
        except Exception as error:  # of this request's own sampler or text: no business of its neighbours
            self._fail(portion.request, error)
            return
        if token is not None:
            self._scheduler.token(portion.request, token)

    def _fail(self, request: Request, error: Exception) -> None:
        self._scheduler.remove(request)
        request.fail(_as_ours(error).again())


def _as_ours(error: Exception) -> AsynctsqpError:
    if isinstance(error, AsynctsqpError):
        return error
    failure = AsynctsqpError(f"the request failed: {one_line(error)}")
    failure.__cause__ = error
    return failure


def _wanted_rows(portion: Portion[Request]) -> int:
    return len(portion.tokens[portion.wanted.value])


def _wanted(batch: Sequence[Portion[Request]]) -> Tokens:
    """The indices of the rows after which scores are wanted."""
    rows: list[int] = []
    start = 0
    for portion in batch:
        rows += range(start, start + len(portion.tokens))[portion.wanted.value]
        start += len(portion.tokens)
    return np.array(rows, np.int64)
