"""Thousands of short requests through one engine, as a process: `python -m tests.many_requests MODEL ENDPOINT GPU_PID`.

Prints a JSON list: after each round of requests, what the operating system and Python say is held.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import itertools
import json
import os
import random
import re
import sys
import warnings
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asynctsqp

# Until the GPU side's cache of decode calls is full, by their rows and places: it levelled off after 3500
WARM_UP, ROUNDS, ROUND = 3500, 4, 500  # requests, rounds, requests in each
AT_ONCE = 8
SETTLE_S = 0.3  # cancelled requests end on their own
CONTAINERS = (dict, list, set, deque)
BAD_PROMPTS: list[Any] = ["", [], [1, -1], [49152], [1, "two"], [1] * 4097, [{"role": "user"}]]


def held_by(pid: int) -> dict[str, int]:
    """By the operating system's account: kB of private memory, threads, open files."""
    status = Path(f"/proc/{pid}/status").read_text()
    numbers = {name: int(number) for name, number in re.findall(r"(\w+):\s+(\d+)", status)}
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return {"RssAnon": numbers["RssAnon"], "threads": numbers["Threads"], "open files": files}


def entries(root: object) -> int:
    """Of all containers that objects of our packages hold, beginning with one of them."""
    seen: set[int] = set()
    found, waiting = 0, [root]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, CONTAINERS):
            found += len(thing)
        elif not type(thing).__module__.startswith(("asynctsqp", "tee_side", "asyncio")):
            continue
        waiting += gc.get_referents(thing)
    return found


def tidy() -> None:
    """Gives back what is free: in the gaps between what is used a leak would hide for long."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def held_by_python(engine: asynctsqp.Engine) -> dict[str, int]:
    objects = gc.get_objects()
    with warnings.catch_warnings(action="ignore"):  # some of torch's objects mind being looked at
        tasks = sum(isinstance(thing, asyncio.Task) and not thing.done() for thing in objects)
    return {"objects": len(objects), "tasks": tasks, "entries": entries(engine)}


async def ask(engine: asynctsqp.Engine, chance: random.Random) -> None:
    """One request: answered, refused, left early, or cancelled at any moment."""
    prompt: Any = [chance.randrange(3, 49152) for _ in range(chance.randrange(1, 40))]
    match chance.randrange(10):
        case 0:
            with contextlib.suppress(asynctsqp.BadInputError):
                await engine.complete(chance.choice(BAD_PROMPTS), max_new_tokens=2)
        case 1:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(engine.complete(prompt, max_new_tokens=16), chance.uniform(0, 0.05))
        case 2:
            async with contextlib.aclosing(engine.generate(prompt, max_new_tokens=16)) as pieces:
                await anext(pieces)
        case 3:
            await engine.logits(prompt[:4])
        case _:
            await engine.complete(prompt, max_new_tokens=chance.randrange(1, 3))


async def ask_many(engine: asynctsqp.Engine, chances: Iterator[random.Random]) -> None:
    for chance in chances:
        await ask(engine, chance)


def spans() -> list[tuple[int, int]]:
    """The numbers of each round's requests, which are also their seeds."""
    ends = [WARM_UP + ROUND * number for number in range(ROUNDS + 1)]
    return list(itertools.pairwise([0, *ends]))


async def run(model: str, endpoint: str, gpu_pid: int) -> list[dict[str, dict[str, int]]]:
    held = []
    async with asynctsqp.Engine.connect(model, endpoint, threads=1) as engine:
        for first, last in spans():
            chances = (random.Random(number) for number in range(first, last))
            await asyncio.gather(*(ask_many(engine, chances) for _ in range(AT_ONCE)))
            await asyncio.sleep(SETTLE_S)
            tidy()
            held.append({"TEE side": held_by(os.getpid()) | held_by_python(engine), "GPU side": held_by(gpu_pid)})
    return held


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(sys.argv[1], sys.argv[2], int(sys.argv[3])))))
