"""Several requests to one engine at once, as their callers see them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from asynctsqp import Engine
from tee_side.request import Progress


async def together(engine: Engine, prompts: Sequence[Sequence[int]], new_tokens: int) -> dict[str, Any]:
    """A greedy answer of exactly `new_tokens` tokens to each prompt, all asked for in the same moment.

    seconds: until the last token of all has come. first_s: to each request's first token; gaps_s: from each token to
    the same request's next one. calls: of the passes that each request had a part in.
    """
    start = time.perf_counter()
    answers = await asyncio.gather(*(_answer(engine, prompt, new_tokens) for prompt in prompts))
    arrivals = [arrivals for arrivals, _ in answers]
    return {
        "seconds": max(times[-1] for times in arrivals) - start,
        "tokens": sum(map(len, arrivals)),
        "first_s": [times[0] - start for times in arrivals],
        "gaps_s": [after - before for times in arrivals for before, after in pairwise(times)],
        "calls": [progress.rpc.calls for _, progress in answers],
    }


async def _answer(engine: Engine, prompt: Sequence[int], new_tokens: int) -> tuple[list[float], Progress]:
    progress = Progress()
    stream = engine.generate(
        list(prompt), progress=progress, max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True
    )
    return [time.perf_counter() async for _ in stream], progress
