"""Clients of a service: such as know their answers, such as read slowly, leave, or talk nonsense."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

import httpx

NEW_TOKENS = 12
MARGIN = 0.05  # between the two likeliest tokens: below it rounding may choose another one in a batch
CLIENT_S = 120.0  # more than any answer takes
BEGINNINGS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time there was a",
    "The largest planet of the solar system is",
    "In the morning I like to drink",
    "The first president of the United States was",
    "A triangle has three",
    "The sun rises in the",
    "Two plus two is",
    "To bake bread you need",
    "The opposite of hot is",
    "Cats and dogs are",
    "The Pacific is the largest",
    "She opened the door and saw",
    "The history of mathematics begins",
    "Rain falls from the",
    "The speed of light is",
    "My favourite season is",
    "A week has seven",
    "The recipe calls for two cups of",
    "Photosynthesis is the process by which",
    "The old man looked at the",
    "Computers work with",
    "The great wall of China was built",
)
BAD_BODIES: tuple[tuple[bytes, int], ...] = (
    (b"", 400),
    (b"{", 400),
    (b"[1, 2]", 400),
    (b"\xff\xfe\x00", 400),
    (b'{"model": 1}', 400),
    (b"{" * 10_000, 400),
    (b'{"prompt": "x", "model": "no such model"}', 404),
    (b" " * (2 << 20), 413),
)


class Wrong(Exception):
    """An answer that is not the expected one."""


class Clients:
    """All of them, on one connection pool."""

    def __init__(self, url: str, model: str, count: int) -> None:
        limits = httpx.Limits(max_connections=2 * count, max_keepalive_connections=count)
        self._http = httpx.AsyncClient(base_url=url, limits=limits, timeout=CLIENT_S)
        self._model = model
        self._answers: dict[str, str] = {}
        self._kinds: Sequence[tuple[int, str, Callable[[random.Random], Awaitable[None]]]] = (
            (45, "whole", self._whole),
            (20, "stream", self._stream),
            (10, "slow reader", self._slow_reader),
            (10, "leaves in a stream", self._leaves_in_a_stream),
            (7, "leaves before an answer", self._leaves_before_an_answer),
            (8, "bad body", self._bad_body),
        )
        self.done: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()

    async def close(self) -> None:
        await self._http.aclose()

    async def learn(self) -> int:
        """Asks for each answer while nobody else asks; -> how many are beyond doubt."""
        for prompt in BEGINNINGS:
            response = await self._http.post("/v1/completions", json=self._asked(prompt) | {"logprobs": 2})
            choice = response.json()["choices"][0]
            tops = [sorted(top.values(), reverse=True) for top in choice["logprobs"]["top_logprobs"]]
            if all(len(top) > 1 and top[0] - top[1] >= MARGIN for top in tops):
                self._answers[prompt] = choice["text"]
        return len(self._answers)

    async def run(self, count: int, seconds: float) -> None:
        """So many clients at once, each with one request after another."""
        end = asyncio.get_running_loop().time() + seconds
        await asyncio.gather(*(self._one_after_another(random.Random(seed), end) for seed in range(count)))

    async def _one_after_another(self, chance: random.Random, end: float) -> None:
        weights = [weight for weight, _, _ in self._kinds]
        while asyncio.get_running_loop().time() < end:
            _, name, act = chance.choices(self._kinds, weights)[0]
            try:
                await act(chance)
                self.done[name] += 1
            except (Wrong, httpx.HTTPError, ValueError, KeyError) as error:
                self.failed[f"{name}: {type(error).__name__} {error}"[:120]] += 1

    async def _whole(self, chance: random.Random) -> None:
        prompt = chance.choice(list(self._answers))
        response = await self._http.post("/v1/completions", json=self._asked(prompt))
        if response.status_code != httpx.codes.OK:
            raise Wrong(response.status_code)
        self._compare(prompt, response.json()["choices"][0]["text"])

    async def _stream(self, chance: random.Random, pause_s: float = 0.0) -> None:
        prompt = chance.choice(list(self._answers))
        text = ""
        async with self._events(prompt) as events:
            async for event in events:
                text += event["choices"][0]["text"]
                await asyncio.sleep(pause_s)
        self._compare(prompt, text)

    async def _slow_reader(self, chance: random.Random) -> None:
        await self._stream(chance, pause_s=chance.uniform(0.1, 0.5))

    async def _leaves_in_a_stream(self, chance: random.Random) -> None:
        left = chance.randrange(1, NEW_TOKENS)
        async with self._events(chance.choice(list(self._answers))) as events:
            async for _ in events:
                left -= 1
                if not left:
                    return

    async def _leaves_before_an_answer(self, chance: random.Random) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(chance.uniform(0, 0.5)):
                await self._whole(chance)

    async def _bad_body(self, chance: random.Random) -> None:
        body, status = chance.choice(BAD_BODIES)
        headers = {"content-type": "application/json"}
        response = await self._http.post("/v1/completions", content=body, headers=headers)
        if response.status_code != status or "error" not in response.json():
            raise Wrong(response.status_code)

    def _asked(self, prompt: str) -> dict[str, Any]:
        return {"model": self._model, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}

    @contextlib.asynccontextmanager
    async def _events(self, prompt: str) -> AsyncIterator[AsyncIterator[Mapping[str, Any]]]:
        asked = self._asked(prompt) | {"stream": True}
        async with self._http.stream("POST", "/v1/completions", json=asked) as response:
            if response.status_code != httpx.codes.OK:
                raise Wrong(response.status_code)
            yield _decoded(response.aiter_lines())

    def _compare(self, prompt: str, text: str) -> None:
        if text != self._answers[prompt]:
            raise Wrong("another answer")


async def _decoded(lines: AsyncIterator[str]) -> AsyncIterator[Mapping[str, Any]]:
    async for line in lines:
        if line == "data: [DONE]":
            return
        if line:
            yield json.loads(line.removeprefix("data: "))
    raise Wrong("a stream without an end")
