"""Work for a client for as long as it is there, has time, and the service runs."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

from starlette.types import Receive

from asynctsqp.service.api_errors import ApiError, stopping

Result = TypeVar("Result")


class ClientGone(Exception):
    """There is nobody to answer any more."""


async def attended(work: Coroutine[Any, Any, Result], receive: Receive, limit_s: float, stop: asyncio.Event) -> Result:
    """Awaits `work`; cancels it when the client leaves, after limit_s seconds, or at `stop`.

    receive: of a request whose body has been read. Raises ClientGone or ApiError in those cases.
    """
    working, left = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((working, left, stopped), timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if left.done():
            raise ClientGone
        if stopped.done():
            raise stopping()
        raise ApiError(504, "timeout", f"the answer took longer than {limit_s:g} s: ask for fewer tokens")
    finally:
        await _end((working, left, stopped))


async def all_or_none(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Awaits all of them; the first that fails ends the others."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        await _end(tasks)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(tasks: Iterable[asyncio.Future[Any]]) -> None:
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
