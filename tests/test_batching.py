"""Many requests at once, long prompts in several chunks at once: nobody's answer depends on the neighbours."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import asynctsqp
from tee_side import carriers
from tee_side.kv_cache import KVCache, Span
from tee_side.scheduler import Scheduler
from tests.test_parity import reference

WHOLE_CONTEXT = 512 * 3 * 2 * 2 * 16 * 4  # bytes of the tiny model's keys and values, all 512 tokens of them
Connect = Callable[..., asynctsqp.Engine]


def prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    seeded = random.Random(seed)
    return [[seeded.randrange(3, 49152) for _ in range(seeded.randrange(1, longest))] for _ in range(count)]


async def ask(engine: asynctsqp.Engine, prompt: list[int], tokens: int = 16) -> list[int]:
    return (await engine.complete(prompt, max_new_tokens=tokens, temperature=0, ignore_eos=True)).token_ids


@pytest.mark.parametrize("options", [{}, {"lanes": 1}, {"lanes": 4, "chunk_tokens": 7}, {"transport": "binary"}])
@pytest.mark.parametrize("partition", ["shielded", "fused-layer", "batched"])
def test_twenty_requests_at_once_answer_as_each_alone(
    partition: str, options: dict[str, Any], connect: Connect, tiny_model: Callable[[str], Path]
) -> None:
    asked = prompts(20, 60)

    async def run() -> list[list[int]]:
        async with connect(partition=partition, **options) as engine:
            return await asyncio.gather(*(ask(engine, prompt) for prompt in asked))

    assert asyncio.run(run()) == [reference(tiny_model("gqa"), prompt, 16) for prompt in asked]


@pytest.mark.parametrize("partition", ["shielded", "per-op", "batched", "fused", "fused-layer"])
@pytest.mark.parametrize("lanes", [1, 2, 3, 8])
def test_chunks_in_flight_change_no_token(
    lanes: int, partition: str, connect: Connect, tiny_model: Callable[[str], Path]
) -> None:
    prompt = [1, *range(100, 400)]

    async def run() -> tuple[list[int], torch.Tensor]:
        async with connect(partition=partition, lanes=lanes, chunk_tokens=32) as engine:
            return await ask(engine, prompt), await engine.logits(prompt)

    tokens, scores = asyncio.run(run())
    assert tokens == reference(tiny_model("gqa"), prompt, 16)
    assert scores.shape == (len(prompt), 49152)


def test_lanes_change_no_bit(connect: Connect) -> None:
    """The same chunks, on however many lanes: the scores are equal, not only near, and so are the tokens."""
    prompt, chunk = [1, *range(100, 400)], 32

    async def run(lanes: int) -> tuple[list[int], torch.Tensor]:
        async with connect(lanes=lanes, chunk_tokens=chunk) as engine:
            return await ask(engine, prompt), await engine.logits(prompt)

    (tokens, scores), *others = [asyncio.run(run(lanes)) for lanes in (1, 2, 4)]
    for other_tokens, other_scores in others:
        assert other_tokens == tokens
        assert torch.equal(other_scores, scores)


def test_who_leaves_takes_nobody_along_and_leaves_its_memory(
    connect: Connect, tiny_model: Callable[[str], Path]
) -> None:
    """Requests that are cancelled at every moment, beside one that is not; all their room is free at the end."""
    kept, left = [1, *range(200, 260)], prompts(30, 200, seed=3)

    async def leave(engine: asynctsqp.Engine, prompt: list[int], after_s: float) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(ask(engine, prompt, tokens=256), after_s)

    async def run() -> tuple[list[int], list[int]]:
        async with connect(lanes=3, chunk_tokens=16, kv_memory=WHOLE_CONTEXT) as engine:
            leavers = [leave(engine, prompt, 0.003 * index) for index, prompt in enumerate(left)]
            answer, *_ = await asyncio.gather(ask(engine, kept, tokens=64), *leavers)
            return answer, await asyncio.wait_for(ask(engine, [5] * 480, tokens=32), 30)

    answer, after = asyncio.run(run())
    assert answer == reference(tiny_model("gqa"), kept, 64)
    assert after == reference(tiny_model("gqa"), [5] * 480, 32)


def test_requests_beyond_the_memory_wait_and_are_answered(connect: Connect, tiny_model: Callable[[str], Path]) -> None:
    asked = prompts(12, 300, seed=5)

    async def run() -> list[list[int]]:
        async with connect(kv_memory=512 << 10) as engine:
            return await asyncio.gather(*(ask(engine, prompt, tokens=8) for prompt in asked))

    assert asyncio.run(run()) == [reference(tiny_model("gqa"), prompt, 8) for prompt in asked]


def test_places_that_make_way_for_others_change_no_token(
    connect: Connect, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(carriers, "MOST_KEPT", 2)
    asked = prompts(6, 70)

    async def run() -> list[list[int]]:
        async with connect() as engine:
            answers = await asyncio.gather(*(ask(engine, prompt, tokens=8) for prompt in asked))
            carrier = engine._pipeline._link.session.carrier  # type: ignore[union-attr]
            assert isinstance(carrier, carriers.SharedMemoryCarrier)
            assert 0 < len(carrier._kept) <= 2
            return answers

    assert asyncio.run(run()) == [reference(tiny_model("gqa"), prompt, 8) for prompt in asked]


def test_steps_are_shared(connect: Connect) -> None:
    """Sixteen answers of 33 tokens take far fewer calls together than one after another: 13 a step."""

    async def calls(at_once: bool) -> int:
        async with connect(log_rpc=None) as engine:
            work = [engine.complete([1, n + 3], max_new_tokens=33, temperature=0, ignore_eos=True) for n in range(16)]
            done = await asyncio.gather(*work) if at_once else [await one for one in work]
            return sum(one.rpc.calls for one in done) if not at_once else max(one.rpc.calls for one in done)

    alone, together = asyncio.run(calls(at_once=False)), asyncio.run(calls(at_once=True))
    assert alone == 16 * 33 * 13
    assert together < alone / 8


def test_a_batch_that_cannot_begin_fails_and_the_next_one_does_not(
    connect: Connect, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    extend, prompt = KVCache.extend, [1, *range(300, 320)]

    def no_memory(self: KVCache, length: int) -> Span:
        if length == 13:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return extend(self, length)

    async def run() -> list[Any]:
        async with connect() as engine:
            failing = [ask(engine, prompt[:13]) for _ in range(3)]
            failed = await asyncio.wait_for(asyncio.gather(*failing, return_exceptions=True), 20)
            return [await ask(engine, prompt), *failed]

    monkeypatch.setattr(KVCache, "extend", no_memory)
    answer, *failed = asyncio.run(run())
    assert answer == reference(tiny_model("gqa"), prompt, 16)
    assert all(isinstance(error, asynctsqp.AsynctsqpError) and "memory" in str(error) for error in failed)


def test_a_defect_of_ours_leaves_nobody_waiting(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler itself fails, in the middle of three requests' decodes."""
    decodes, calls = Scheduler._decodes, 0

    def failing(self: Scheduler[Any]) -> list[Any]:
        nonlocal calls
        calls += 1
        if calls == 12:
            raise KeyError("portion")
        return decodes(self)

    async def run() -> None:
        async with connect() as engine:
            waiting = [ask(engine, [1, 300 + request], tokens=400) for request in range(3)]
            failed = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 20)
            assert all(isinstance(error, asynctsqp.AsynctsqpError) and "portion" in str(error) for error in failed)
            assert "portion" in str(engine.failure)
            with pytest.raises(asynctsqp.AsynctsqpError, match="portion"):
                await ask(engine, [1, 300])

    monkeypatch.setattr(Scheduler, "_decodes", failing)
    asyncio.run(run())


def test_a_failure_of_one_is_not_the_others(connect: Connect, tiny_model: Callable[[str], Path]) -> None:
    """One request's own sampler fails: a temperature so small that no probability is a number."""
    prompt = [1, *range(300, 320)]

    async def run() -> list[Any]:
        async with connect() as engine:
            bad = engine.complete(prompt, max_new_tokens=8, temperature=1e-45, seed=1)
            return await asyncio.gather(ask(engine, prompt), bad, ask(engine, prompt), return_exceptions=True)

    first, bad, second = asyncio.run(run())
    assert first == second == reference(tiny_model("gqa"), prompt, 16)
    assert isinstance(bad, Exception | asynctsqp.Completion)
