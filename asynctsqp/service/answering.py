"""One request for answers, from its admission to the last byte: ASGI responses that are made as they are sent."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from asynctsqp.engine import Engine
from asynctsqp.errors import AsynctsqpError
from asynctsqp.service.admission import Admission
from asynctsqp.service.api_errors import ApiError, json_response, of_engine
from asynctsqp.service.attendance import ClientGone, all_or_none, attended
from asynctsqp.service.forms import Form, joined, usage
from asynctsqp.service.jobs import Job, Part, run
from asynctsqp.service.metrics import Metrics

MOST_UNREAD = 1024  # parts of a stream that its client has not taken
_HEAD = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
_DONE = b"data: [DONE]\n\n"

Deliver = Callable[[int, Part], None]  # with the index of the answer


@dataclass(frozen=True)
class Desk:
    """What every request for answers needs. limit_s: for one request."""

    engine: Engine
    admission: Admission
    metrics: Metrics
    model: str
    limit_s: float

    async def run(self, jobs: list[Job], deliver: Deliver) -> None:
        def to(index: int) -> Callable[[Part], None]:
            return lambda part: deliver(index, part)

        await all_or_none(run(job, self.engine, self.metrics, to(index)) for index, job in enumerate(jobs))

    def head(self, form: Form, kind: str) -> dict[str, Any]:
        """How every object of one request begins."""
        return {
            "id": form.prefix + secrets.token_hex(12),
            "object": kind,
            "created": int(time.time()),
            "model": self.model,
        }


class Whole:
    """All answers in one object."""

    def __init__(self, desk: Desk, form: Form, jobs: list[Job], copies: int) -> None:
        """copies: answers to each prompt."""
        self._desk, self._form, self._jobs, self._copies = desk, form, jobs, copies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        desk, form, jobs = self._desk, self._form, self._jobs
        parts: list[list[Part]] = [[] for _ in jobs]
        with desk.admission.enter(len(jobs)):
            await attended(
                desk.run(jobs, lambda index, part: parts[index].append(part)),
                receive,
                desk.limit_s,
                desk.admission.stop,
            )
        choices = [form.choice(index, joined(answer)) for index, answer in enumerate(parts)]
        content = {**desk.head(form, form.whole), "choices": choices, "usage": usage(jobs, self._copies)}
        await json_response(content)(scope, receive, send)


class Stream:
    """All answers as server-sent events, in the order in which their parts come.

    The response begins with the first part, so that what fails before it is an error with a status. What fails later
    is an event with an error, and no [DONE] follows.
    """

    def __init__(self, desk: Desk, form: Form, jobs: list[Job], copies: int, include_usage: bool) -> None:
        self._desk, self._form, self._jobs, self._copies = desk, form, jobs, copies
        self._include_usage = include_usage
        self._begun = False
        self._offsets = [0] * len(jobs)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        desk = self._desk
        with desk.admission.enter(len(self._jobs)):
            try:
                await attended(self._answer(send), receive, desk.limit_s, desk.admission.stop)
            except ClientGone:
                if not self._begun:  # else there is nothing more to say; it also "goes" when it has got the last byte
                    raise
            except (ApiError, AsynctsqpError) as error:
                if not self._begun:
                    raise
                await self._fail(send, error)

    async def _answer(self, send: Send) -> None:
        unread: asyncio.Queue[tuple[int, Part] | None] = asyncio.Queue(MOST_UNREAD)
        await all_or_none((self._make(unread), self._tell(unread, send)))

    async def _make(self, unread: asyncio.Queue[tuple[int, Part] | None]) -> None:
        try:
            await self._desk.run(self._jobs, lambda index, part: unread.put_nowait((index, part)))
            unread.put_nowait(None)
        except asyncio.QueueFull:
            raise ApiError(503, "slow_reader", "the stream was not read as fast as it was made") from None

    async def _tell(self, unread: asyncio.Queue[tuple[int, Part] | None], send: Send) -> None:
        form = self._form
        head = self._desk.head(form, form.part)
        if self._include_usage:
            head["usage"] = None
        opened: set[int] = set()
        while (item := await unread.get()) is not None:
            index, part = item
            if index not in opened and (opening := form.opening(index)) is not None:
                await self._event(send, {**head, "choices": [opening]})
            opened.add(index)
            await self._event(send, {**head, "choices": [form.event(index, part, self._offsets[index])]})
            self._offsets[index] += sum(len(score.text) for score in part.scores or ())
        if self._include_usage:
            await self._event(send, {**head, "choices": [], "usage": usage(self._jobs, self._copies)})
        await send({"type": "http.response.body", "body": _DONE, "more_body": False})

    async def _event(self, send: Send, content: dict[str, Any], more: bool = True) -> None:
        if not self._begun:
            self._begun = True
            await send({"type": "http.response.start", "status": 200, "headers": _HEAD})
        body = b"data: " + msgspec.json.encode(content) + b"\n\n"
        await send({"type": "http.response.body", "body": body, "more_body": more})

    async def _fail(self, send: Send, error: ApiError | AsynctsqpError) -> None:
        """The last event. A client that does not take it is cut by its connection's own timer."""
        shown = error if isinstance(error, ApiError) else of_engine(error)
        with contextlib.suppress(OSError):
            await self._event(send, shown.body(), more=False)
