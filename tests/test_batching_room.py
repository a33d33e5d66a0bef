"""Who leaves gives back at once what it held, and who waits gets its turn: by the engine's own accounts."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

import asynctsqp
from tee_side.generation import Generation
from tee_side.kv_cache import KVMemory
from tee_side.pipeline import Pipeline
from tee_side.scheduler import Portion, Scheduler
from tests.test_batching import ask, prompts

Connect = Callable[..., asynctsqp.Engine]
TOKEN_BYTES = 3 * 2 * 2 * 16 * 4  # keys and values of the tiny model's layers
LONG, NEW = [1, *range(100, 500)], 64


def pipeline(engine: asynctsqp.Engine) -> Pipeline:
    assert engine._pipeline is not None
    return engine._pipeline


async def in_its_thread(engine: asynctsqp.Engine, look: Callable[[Pipeline], Any]) -> Any:
    """What a look at the pipeline says, between two steps of it."""

    async def run() -> Any:
        return look(pipeline(engine))

    assert engine._thread is not None
    return await engine._thread.run(run())


async def until(engine: asynctsqp.Engine, true: Callable[[Pipeline], bool]) -> None:
    async with asyncio.timeout(20):
        while not await in_its_thread(engine, true):
            await asyncio.sleep(0)


def lanes_idle(engine: Pipeline) -> bool:
    return all(lane.idle for lane in engine._batches._workers)


@pytest.fixture
def staying(monkeypatch: pytest.MonkeyPatch) -> Callable[[asynctsqp.Engine], Any]:
    """A neighbour that gets one token and never another, so that it never ends; it holds 512 tokens' room."""
    prompt, accept = [1, 2, 3], Generation.accept

    def accepted(self: Generation, first: int, scores: Any) -> int | None:
        token = accept(self, first, scores)
        return None if self._tokens[: len(prompt)] == prompt else token

    monkeypatch.setattr(Generation, "accept", accepted)

    @contextlib.asynccontextmanager
    async def neighbour(engine: asynctsqp.Engine) -> AsyncIterator[None]:
        stream = engine.generate(prompt, max_new_tokens=505, temperature=0, ignore_eos=True)
        async with contextlib.aclosing(stream):
            await anext(stream)
            yield

    return neighbour


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("sent", [0, 16, 160], ids=["before its prefill", "early in it", "late in it"])
def test_who_is_cancelled_in_its_prefill_leaves_its_room_at_once(sent: int, lanes: int, connect: Connect) -> None:
    async def run() -> None:
        async with connect(lanes=lanes, chunk_tokens=16) as engine:
            request = asyncio.create_task(ask(engine, LONG, NEW))
            await until(engine, lambda own: bool(own._memory.reserved_bytes) and sent_of(own) >= sent)
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request
            await until(engine, lambda own: not own._memory.reserved_bytes)
            await until(engine, lambda own: own._batches.idle and lanes_idle(own))
            assert not await in_its_thread(engine, lambda own: own._batches._scheduler._running)

    asyncio.run(run())


def sent_of(own: Pipeline) -> int:
    """Tokens of the first prompt that went out; none is left when it is through."""
    waiting = own._batches._scheduler._prompts
    return waiting[0][1].sent if waiting else len(LONG)


@pytest.mark.parametrize("pieces", [0, 1, 5])
def test_who_leaves_does_not_wait_for_its_neighbours_ends(
    pieces: int, connect: Connect, staying: Callable[[asynctsqp.Engine], Any]
) -> None:
    """The reservation of the one that left is back while the neighbour's is held."""

    async def run() -> None:
        async with connect(lanes=2, chunk_tokens=16) as engine, staying(engine):
            alone = await in_its_thread(engine, lambda own: own._memory.reserved_bytes)
            assert alone == 512 * TOKEN_BYTES
            stream = engine.generate(LONG, max_new_tokens=NEW, temperature=0, ignore_eos=True)
            async with contextlib.aclosing(stream):
                first = asyncio.ensure_future(anext(stream))
                await until(engine, lambda own: own._memory.reserved_bytes > alone)
                if pieces:
                    await first
                    for _ in range(pieces - 1):
                        await anext(stream)
                else:
                    first.cancel()
                    await asyncio.wait((first,))
            await until(engine, lambda own: own._memory.reserved_bytes == alone)
            assert await in_its_thread(engine, lambda own: len(own._batches._scheduler._running)) == 1

    asyncio.run(run())


class Batched:
    """What the scheduler puts together, and a halt of the engine's thread once two requests have had a chunk."""

    def __init__(self) -> None:
        self.caller = asyncio.get_running_loop()
        self.halted = asyncio.Event()
        self.go_on = threading.Event()
        self.chunks: list[Generation] = []  # whose they were

    def note(self, batch: list[Portion[Any]]) -> None:
        self.chunks += [portion.request for portion in batch if not portion.decode]
        if len(set(self.chunks)) == 2 and not self.go_on.is_set():
            self.caller.call_soon_threadsafe(self.halted.set)
            assert self.go_on.wait(20)


def test_a_short_request_overtakes_long_prompts_which_take_turns(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []  # by the length of the request, at each of its tokens
    accept, following = Generation.accept, Scheduler.next

    async def run() -> Batched:
        batched = Batched()

        def noted(self: Scheduler[Any]) -> list[Portion[Any]]:
            batch = following(self)
            batched.note(batch)
            return batch

        monkeypatch.setattr(Scheduler, "next", noted)
        async with connect(lanes=2, chunk_tokens=8) as engine:
            long = [asyncio.create_task(ask(engine, [*LONG, n], 1)) for n in (5, 6)]
            await batched.halted.wait()
            short = asyncio.create_task(ask(engine, [1, 7], 4))
            for _ in range(10):  # until it lies before the engine's thread
                await asyncio.sleep(0)
            batched.go_on.set()
            await asyncio.gather(short, *long)
            return batched

    def accepted(self: Generation, first: int, scores: Any) -> int | None:
        ended.append(len(self._tokens))
        return accept(self, first, scores)

    monkeypatch.setattr(Generation, "accept", accepted)
    chunks = asyncio.run(run()).chunks
    assert ended == [2, 3, 4, 5, len(LONG) + 1, len(LONG) + 1], "the short one's four tokens come first"
    one, other, _ = dict.fromkeys(chunks)
    turns = ["one" if chunk is one else "other" for chunk in chunks if chunk in (one, other)]
    alone = turns.index("other") - 1  # chunks of the first one before the second one came
    both = turns.count("one") - alone
    assert turns[alone : alone + 2 * both] == ["one", "other"] * both


def test_more_than_the_memory_holds_waits_and_all_are_answered(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for two of the twelve: never more is reserved, and some have waited."""
    limit, reserved, queued = 2 * 128 * TOKEN_BYTES, [0], [0]
    admit = KVMemory._admit

    def noted(self: KVMemory) -> None:
        admit(self)
        reserved.append(self.reserved_bytes)
        queued.append(len(self._queue))

    monkeypatch.setattr(KVMemory, "_admit", noted)

    async def run() -> list[list[int]]:
        async with connect(kv_memory=limit, chunk_tokens=16) as engine:
            return await asyncio.gather(*(ask(engine, [1] * 64 + prompt, 16) for prompt in prompts(12, 40)))

    assert [len(answer) for answer in asyncio.run(run())] == [16] * 12
    assert max(reserved) == limit
    assert max(queued) == 10
    assert reserved[-1] == queued[-1] == 0
