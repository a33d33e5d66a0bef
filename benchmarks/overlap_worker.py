"""The TEE side of benchmarks.overlap: an engine for each number of lanes, all on one GPU side of set speed."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from asynctsqp import Engine
from benchmarks.harness import Worker
from benchmarks.together import together
from benchmarks.worker import serve


class Overlap:
    """The commands that benchmarks.worker runs by name."""

    def __init__(self, runner: asyncio.Runner, resources: contextlib.ExitStack) -> None:
        self._runner = runner
        self._resources = resources
        self._gpu: Worker | None = None
        self._engines: dict[int, Engine] = {}

    def load(self, model: str, dtype: str, lanes: list[int], chunk_tokens: int, threads: int) -> dict[str, Any]:
        """threads: of each engine."""
        self._gpu = self._resources.enter_context(Worker("the timed GPU side", "benchmarks.timed_gpu", {}))
        endpoint = self._gpu.ask("serve", model=model, timed=True)["endpoint"]
        options: dict[str, Any] = {"dtype": dtype, "chunk_tokens": chunk_tokens, "threads": threads}
        for count in lanes:
            engine = Engine.connect(model, endpoint, lanes=count, **options)
            self._runner.run(engine.__aenter__())
            self._resources.callback(self._close, engine)
            self._engines[count] = engine
        return {}

    def work(
        self, lanes: int, prompts: list[list[int]], new_tokens: int, call_s: float, product_s: float
    ) -> dict[str, Any]:
        """call_s, product_s: of the GPU side (timed_gpu.TimedExecutor). gpu: what it did meanwhile."""
        if self._gpu is None:
            raise RuntimeError("nothing is loaded")
        self._gpu.ask("set", call_s=call_s, product_s=product_s)
        done = self._runner.run(together(self._engines[lanes], prompts, new_tokens))
        return done | {"gpu": self._gpu.ask("counts")}

    def _close(self, engine: Engine) -> None:
        self._runner.run(engine.__aexit__(None, None, None))


def main() -> None:
    with asyncio.Runner() as runner, contextlib.ExitStack() as resources:
        overlap = Overlap(runner, resources)
        serve({"load": overlap.load, "work": overlap.work})


if __name__ == "__main__":
    main()
