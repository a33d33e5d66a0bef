"""The processes that benchmarks.protect compares, loaded together or one by one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.cli import Step
from benchmarks.contenders import Answer, Measure, openmp_added
from benchmarks.harness import Worker

MASKED = ("mask", "full", "full, peer")
ALONE = {"int8 inside": True, "transformers": False}  # the model in one process, and whether in int8
ATTENTION = "sdpa"  # transformers' default


class Contenders:
    """By name, as in benchmarks.protect. prompts: for the requests at once; the first is everybody's only one.

    options: of every engine; mask_memory: of those that mask.
    """

    def __init__(
        self,
        model: str,
        options: dict[str, Any],
        mask_memory: int,
        prompts: Sequence[list[int]],
        patience_s: float,
    ) -> None:
        self._model = model
        self._options = options
        self._mask_memory = mask_memory
        self._prompts = prompts
        self._patience_s = patience_s
        self._workers: dict[str, Worker] = {}

    @contextlib.contextmanager
    def loaded(self, names: Sequence[str], step: Step) -> Iterator[None]:
        """All of them, asleep."""
        with contextlib.ExitStack() as opened:
            self._workers |= {name: opened.enter_context(self._worker(name)) for name in names}
            for name, worker in self._workers.items():
                step(f"loading: {name}")
                self._load(name, worker)
            try:
                yield
            finally:
                self._workers.clear()

    def prepare(self, name: str, tokens: int) -> dict[str, Any]:
        """Masks for so many tokens; what else the bank would make is left for later."""
        worker = self._workers[name]
        with worker.awake():
            return worker.ask("prepare", tokens=tokens)

    def warm_up(self, names: Sequence[str], measure: Measure) -> None:
        for name in names:
            self.answer(name, measure)

    def answer(self, name: str, measure: Measure) -> Answer:
        """One sample; masks for all of it are there, or as many as fit, which the sample says."""
        masks = None
        if name in MASKED:
            masks = self.prepare(name, measure.prompt_tokens + measure.new_tokens - 1)["tokens"]
        tokens = self._prompts[0][: measure.prompt_tokens]
        extra = {"attention": ATTENTION} if name in ALONE else {}
        answer = self._workers[name].measure("answer", tokens=tokens, new_tokens=measure.new_tokens, **extra)
        return answer | {"masks": masks}

    def sustained(self, name: str, requests: int, prompt_tokens: int, new_tokens: int) -> Answer:
        """Just loaded; cpu_s: of all its processes, from asking to the last token."""
        prompts = [prompt[:prompt_tokens] for prompt in self._prompts[:requests]]
        extra = {"attention": ATTENTION} if name in ALONE else {}
        with self._worker(name) as worker:
            self._load(name, worker)
            before = worker.cpu_s()
            answer = worker.measure("together", prompts=prompts, new_tokens=new_tokens, **extra)
            return answer | {"cpu_s": worker.cpu_s() - before}

    def _worker(self, name: str) -> Worker:
        if name in ALONE:
            return Worker(name, "benchmarks.transformers_worker", {}, self._patience_s)
        return Worker(name, "benchmarks.protect_worker", openmp_added(), self._patience_s)

    def _load(self, name: str, worker: Worker) -> None:
        if name in ALONE:
            worker.ask("load", model=self._model, dtype="float32", int8=ALONE[name])
        else:
            level, _, peer = name.partition(", ")
            memory = {"mask_memory": self._mask_memory} if level in MASKED else {}
            options = {"protect": level} | memory | self._options
            worker.ask("load", model=self._model, dtype="float32", options=options, peer=bool(peer))
        worker.sleep()
