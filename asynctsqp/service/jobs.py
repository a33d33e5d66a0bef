"""What the engine is asked for: one answer, to one prompt."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from asynctsqp.engine import Engine, Piece, Progress, Prompt, TokenScore
from asynctsqp.service.metrics import Metrics


@dataclass(frozen=True)
class Job:
    """sampling: SamplingOptions; logprobs: alternatives to each token, None for no log-probabilities at all."""

    prompt: Prompt
    sampling: dict[str, Any]
    logprobs: int | None = None
    echo: bool = False  # the prompt comes back before the answer
    only_echo: bool = False  # and there is no answer
    progress: Progress = field(default_factory=Progress)

    @property
    def usage(self) -> tuple[int, int]:
        """Tokens of the prompt and of the answer so far."""
        return self.progress.prompt_tokens, self.progress.completion_tokens


@dataclass(frozen=True)
class Part:
    """What has come of an answer: text, and how likely its tokens were, if that was asked for."""

    text: str
    scores: list[TokenScore] | None
    finish_reason: str | None = None


async def run(job: Job, engine: Engine, metrics: Metrics, deliver: Callable[[Part], None]) -> None:
    """Delivers the parts of an answer as they come; the last one has a finish reason."""
    since = time.perf_counter()
    if job.echo:
        deliver(await _echo(job, engine))
    if job.only_echo:
        return
    first = True
    async with contextlib.aclosing(
        engine.generate(job.prompt, progress=job.progress, logprobs=job.logprobs, **job.sampling)
    ) as pieces:
        async for piece in pieces:
            now = time.perf_counter()
            (metrics.first_token if first else metrics.between_tokens).observe(now - since)
            first, since = False, now
            deliver(_part(piece))


async def _echo(job: Job, engine: Engine) -> Part:
    scores = await engine.score(job.prompt, top=job.logprobs or 0)
    job.progress.prompt_tokens = len(scores)
    text = (
        job.prompt
        if isinstance(job.prompt, str)
        else b"".join(score.data for score in scores).decode("utf-8", "replace")
    )
    return Part(text, None if job.logprobs is None else scores, "length" if job.only_echo else None)


def _part(piece: Piece) -> Part:
    return Part(piece.text, None if piece.logprobs is None else [piece.logprobs], piece.finish_reason)
