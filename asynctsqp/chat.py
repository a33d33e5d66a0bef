"""A multi-turn chat in a terminal."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import Any

from asynctsqp.engine import Engine


async def chat(engine: Engine, sampling: dict[str, Any]) -> None:
    """Reads lines until end of input (Ctrl-D) or Ctrl-C. The whole conversation is the prompt of each turn."""
    messages: list[dict[str, str]] = []
    print("Chat with the model. Ctrl-D ends.", file=sys.stderr)
    while (line := await asyncio.to_thread(_ask)) is not None:
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        answer = ""
        async with contextlib.aclosing(engine.generate(messages, **sampling)) as pieces:
            async for piece in pieces:
                answer += piece.text
                print(piece.text, end="", flush=True)
        print(flush=True)
        messages.append({"role": "assistant", "content": answer})


def _ask() -> str | None:
    try:
        return input("> ")
    except EOFError:
        return None
