"""What benchmarks compare: this project and `transformers`, each in a worker process, asked the same questions."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from asynctsqp.cores import openmp
from asynctsqp.model_spec import ModelSpec
from benchmarks.harness import PATIENCE_S, Worker

Answer = dict[str, Any]


def openmp_added() -> dict[str, str]:
    """What `python -m asynctsqp.tee` adds to its environment for OpenMP."""
    return {name: value for name, value in openmp().items() if name not in os.environ}


@dataclass(frozen=True)
class Measure:
    """One question, and which time of the answer counts."""

    name: str
    unit: str
    prompt_tokens: int
    new_tokens: int
    key: str  # "first_s", to the first token, or "rest_s", from there to the last
    scale: float

    def value(self, answer: Answer) -> float:
        return float(answer[self.key]) * self.scale


class Contender(Protocol):
    """Asleep but for these two calls."""

    def warm_up(self, measures: Sequence[Measure]) -> None:
        """Runs everything once that will be measured, and settles what is to be settled."""

    def run(self, measure: Measure) -> Answer:
        """One sample."""


class Split:
    """This project: an engine and its local GPU side. `worker` must have loaded; it is put to sleep."""

    def __init__(self, worker: Worker, prompt: list[int]) -> None:
        self._worker = worker
        self._prompt = prompt
        worker.sleep()

    @staticmethod
    def worker(patience_s: float = PATIENCE_S) -> Worker:
        """With what `python -m asynctsqp.tee` adds to its environment."""
        return Worker("asynctsqp", "benchmarks.split_worker", openmp_added(), patience_s)

    def warm_up(self, measures: Sequence[Measure]) -> None:
        for measure in measures:
            self.run(measure)

    def run(self, measure: Measure) -> Answer:
        return self._worker.measure("answer", **self._question(measure, measure.new_tokens))

    def first_token(self, measure: Measure) -> Answer:
        """The same prompt, answered by one token: what is to be taken off a longer answer's calls and bytes."""
        return self._worker.measure("answer", **self._question(measure, 1))

    def _question(self, measure: Measure, new_tokens: int) -> dict[str, Any]:
        return {"tokens": self._prompt[: measure.prompt_tokens], "new_tokens": new_tokens}


class Transformers:
    """`transformers` in one process, with its own defaults and the attention that is faster for each measure."""

    KINDS = ("sdpa", "eager")  # its names; the first is its default

    def __init__(self, worker: Worker, prompt: list[int]) -> None:
        self._worker = worker
        self._prompt = prompt
        self.attention: dict[str, str] = {}
        worker.sleep()

    @staticmethod
    def worker(patience_s: float = PATIENCE_S) -> Worker:
        return Worker("transformers", "benchmarks.transformers_worker", {}, patience_s)

    def warm_up(self, measures: Sequence[Measure]) -> None:
        """Each kind of attention twice: the first run is cold, and the better one counts."""
        for measure in measures:
            best = {kind: min(measure.value(self._ask(measure, kind)) for _ in range(2)) for kind in self.KINDS}
            self.attention[measure.name] = min(best, key=best.__getitem__)

    def run(self, measure: Measure) -> Answer:
        return self._ask(measure, self.attention[measure.name])

    def _ask(self, measure: Measure, attention: str) -> Answer:
        tokens = self._prompt[: measure.prompt_tokens]
        return self._worker.measure("answer", tokens=tokens, new_tokens=measure.new_tokens, attention=attention)


def random_prompt(spec: ModelSpec, tokens: int) -> list[int]:
    """Always the same one."""
    seeded = random.Random(0)
    return [seeded.randrange(spec.vocab_size) for _ in range(tokens)]
