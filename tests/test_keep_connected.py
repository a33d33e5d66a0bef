"""An engine that serves: it notices the loss of its GPU side by itself, and makes the link again by itself."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

import asynctsqp
from asynctsqp import Engine
from tests.conftest import GpuProcess

PROMPT = [1, *range(100, 140)]


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def kept(engine: Engine) -> AsyncIterator[None]:
    keeping = asyncio.create_task(engine.keep_connected())
    try:
        yield
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)


@pytest.mark.parametrize("transport", ["shm", "binary"])
def test_a_lost_link_is_made_again_while_nobody_asks(
    transport: str, tiny_model: Callable[[str], Path], start_gpu: Callable[..., GpuProcess]
) -> None:
    """With --reconnect-s 0: who meets the loss fails at once, who comes later is answered."""
    model = tiny_model("gqa")

    async def run() -> None:
        gpu = start_gpu(model)
        async with Engine.connect(model, gpu.endpoint, transport=transport) as engine, kept(engine):
            before = await engine.complete(PROMPT, max_new_tokens=8, temperature=0)
            assert engine.failure is None
            on_its_way = asyncio.create_task(engine.complete(PROMPT, max_new_tokens=440, ignore_eos=True))
            await until(lambda: engine.meter.running == 1)
            await asyncio.to_thread(gpu.kill)
            with pytest.raises(asynctsqp.GpuSideError):
                await asyncio.wait_for(on_its_way, 2)
            await until(lambda: engine.failure is not None)
            with pytest.raises(asynctsqp.GpuSideError):
                await asyncio.wait_for(engine.complete(PROMPT, max_new_tokens=1), 2)
            await asyncio.sleep(1)  # several attempts fail
            await asyncio.to_thread(start_gpu, model, "--bind", gpu.endpoint)
            await until(lambda: engine.failure is None)
            assert (await engine.complete(PROMPT, max_new_tokens=8, temperature=0)).token_ids == before.token_ids
            await until(lambda: engine.meter.running == 0)

    asyncio.run(run())


def test_without_it_the_loss_stays(tiny_model: Callable[[str], Path], start_gpu: Callable[..., GpuProcess]) -> None:
    model = tiny_model("gqa")

    async def run() -> None:
        gpu = start_gpu(model)
        async with Engine.connect(model, gpu.endpoint) as engine:
            await asyncio.to_thread(gpu.kill)
            await until(lambda: engine.failure is not None)
            await asyncio.to_thread(start_gpu, model, "--bind", gpu.endpoint)
            await asyncio.sleep(1)
            assert engine.failure is not None

    asyncio.run(run())


def test_the_meter_counts_what_an_answer_says_of_itself(connect: Callable[..., Engine]) -> None:
    async def run() -> None:
        async with connect(lanes=1) as engine:
            done = await engine.complete(PROMPT, max_new_tokens=8, temperature=0, ignore_eos=True)
            meter = engine.meter
            assert meter.round_trips()[-1] == done.rpc.calls
            assert (meter.bytes_sent, meter.bytes_received) == (done.rpc.bytes_sent, done.rpc.bytes_received)
            assert meter.wait_s == pytest.approx(done.rpc.wait_s)
            assert 0 < meter.wait_s < meter.pass_s < done.timing.prefill_s + done.timing.decode_s + 0.1
            assert (meter.running, engine.waiting) == (0, 0)

    asyncio.run(run())


def test_who_has_no_room_for_keys_waits(connect: Callable[..., Engine]) -> None:
    async def run() -> None:
        async with connect(kv_memory=3 * 2 * 2 * 16 * 4 * 128) as engine:  # 128 tokens: two sequences of 64
            asked = [
                asyncio.create_task(engine.complete(PROMPT, max_new_tokens=20, temperature=0, ignore_eos=True))
                for _ in range(5)
            ]
            await until(lambda: engine.meter.running == 2)
            assert engine.waiting == 3
            await asyncio.gather(*asked)
            await until(lambda: engine.meter.running == engine.waiting == 0)

    asyncio.run(run())
