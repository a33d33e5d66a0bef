"""A multi-turn chat in a terminal."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from typing import Any

from asynctsqp.engine import Engine
from asynctsqp.reports.stats_table import rendered
from tee_side.request import Progress


async def chat(engine: Engine, sampling: dict[str, Any]) -> None:
    """Reads lines until end of input (Ctrl-D) or Ctrl-C. The whole conversation is the prompt of each turn."""
    messages: list[dict[str, str]] = []
    print("Chat with the model. Ctrl-D ends.", file=sys.stderr)
    while (line := await _ask()) is not None:
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        answer = ""
        progress = Progress()
        async with contextlib.aclosing(engine.generate(messages, progress=progress, **sampling)) as pieces:
            async for piece in pieces:
                answer += piece.text
                print(piece.text, end="", flush=True)
        print(flush=True)
        if progress.stats is not None:
            print(rendered(progress.stats), file=sys.stderr)
        messages.append({"role": "assistant", "content": answer})


async def _ask() -> str | None:
    """A line, or None at the end of input. In a daemon thread: nothing can interrupt `input`, nor need wait for it."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[str | None] = loop.create_future()

    def read() -> None:
        try:
            line: str | None = input("> ")
        except EOFError:
            line = None
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(_resolve, answer, line)

    threading.Thread(target=read, daemon=True).start()
    return await answer


def _resolve(answer: asyncio.Future[str | None], line: str | None) -> None:
    if not answer.done():
        answer.set_result(line)
