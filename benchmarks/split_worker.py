"""The contender that is this project: an engine with a local GPU side, driven by benchmarks.harness."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import Any

from asynctsqp import Engine
from benchmarks.communication import computed
from benchmarks.together import together
from benchmarks.worker import serve
from tee_side.request import Progress


class Split:
    """One engine, and the measurements on it. Times are the caller's, around the public API."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self._runner = runner
        self._engine: Engine | None = None

    def load(self, model: str, dtype: str, options: dict[str, Any]) -> dict[str, Any]:
        self._engine = Engine.launch(model, dtype=dtype, **options)
        self._runner.run(self._engine.__aenter__())
        return {"options": dataclasses.asdict(self._engine.options)}

    def answer(self, tokens: list[int], new_tokens: int) -> dict[str, Any]:
        """Greedy, exactly `new_tokens` tokens. first_s: to the first token; rest_s: from there to the last.

        computed: seconds of both that either side computed, with `stats=True` among the options.
        """
        return self._runner.run(self._answer(tokens, new_tokens))

    def again(self, tokens: list[int], new_tokens: int) -> dict[str, Any]:
        """`answer` without anything that is kept from token to token: each is the first one of a longer prompt."""
        firsts: list[dict[str, Any]] = []
        made: list[int] = []
        for _ in range(new_tokens):
            firsts.append(self.answer(tokens + made, 1))
            made += firsts[-1]["token_ids"]
        spent = [first["first_s"] for first in firsts]
        return {"first_s": spent[0], "rest_s": sum(spent[1:]), "token_ids": made}

    def together(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """An answer to each prompt, all at once: benchmarks.together."""
        return self._runner.run(together(self._loaded(), prompts, new_tokens))

    async def _answer(self, tokens: list[int], new_tokens: int) -> dict[str, Any]:
        engine = self._loaded()
        progress = Progress()
        made: list[int] = []
        arrivals: list[float] = []
        start = time.perf_counter()
        stream = engine.generate(tokens, progress=progress, max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        async for piece in stream:
            arrivals.append(time.perf_counter())
            made.append(piece.token_id)
        busy_s = progress.timing.prefill_s + progress.timing.decode_s
        return {
            "first_s": arrivals[0] - start,
            "rest_s": arrivals[-1] - arrivals[0],
            "token_ids": made,
            "rpc": dataclasses.asdict(progress.rpc),
            "wait_share": progress.rpc.wait_s / busy_s,
            "computed": computed(engine, arrivals[0]),
        }

    def _loaded(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("nothing is loaded")
        return self._engine

    def close(self) -> None:
        if self._engine is not None:
            self._runner.run(self._engine.__aexit__(None, None, None))


def main() -> None:
    with asyncio.Runner() as runner:
        split = Split(runner)
        try:
            serve({"load": split.load, "answer": split.answer, "again": split.again, "together": split.together})
        finally:
            split.close()


if __name__ == "__main__":
    main()
