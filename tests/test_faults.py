"""Either side killed with `kill -9`: nothing leaks, the other side says so, and --reconnect-s heals it."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import asynctsqp
from asynctsqp.errors import GpuSideLost
from asynctsqp.layouts import Layouts
from asynctsqp.messages import Call, Done
from asynctsqp.model_spec import ModelSpec, Op
from tee_side.lanes import Lane
from tee_side.meter import Meter
from tee_side.offload import Offload
from tee_side.plans import Plans
from tee_side.request import RpcTotals
from tee_side.seals import Clear
from tests.conftest import GpuProcess
from tests.processes import (
    assert_one_error,
    gone,
    run_tee,
    shared_memory_names,
    tee_process,
    wait_until,
)

PROMPT = [1, *range(100, 140)]
TEXT = "Once upon a time"
TOKENS = 440  # half a second and more of work for the tiny model
GENERATE = ("--prompt", TEXT, "--max-new-tokens", str(TOKENS), "--temperature", "0", "--ignore-eos")
MIB = 1 << 20


def private_files(directory: Path) -> list[Path]:
    return list(directory.glob("asynctsqp-*"))


def test_a_killed_tee_side_leaves_nothing_and_takes_its_gpu_side_along(
    private_tmp: Path, tiny_model: Callable[[str], Path]
) -> None:
    with tee_process("--model", str(tiny_model("gqa")), *GENERATE) as tee:
        tee.wait_for_text()
        local = tee.local_gpu().pid
        assert private_files(private_tmp), "there is something to clean up"
        tee.signal(signal.SIGKILL)
        assert wait_until(lambda: gone(local)), "the local GPU side outlived its parent"
        assert wait_until(lambda: not private_files(private_tmp))
        assert not shared_memory_names()


def test_a_killed_local_gpu_side_ends_the_tee_side_with_one_line(
    private_tmp: Path, tiny_model: Callable[[str], Path]
) -> None:
    with tee_process("--model", str(tiny_model("gqa")), *GENERATE) as tee:
        tee.wait_for_text()
        tee.local_gpu().kill()
        killed = time.monotonic()
        ended = tee.end()
        assert time.monotonic() - killed < 2
    assert_one_error(ended, 3, "GPU side")
    assert not shared_memory_names()
    assert not private_files(private_tmp)


@pytest.mark.parametrize("transport", ["shm", "binary"])
def test_a_killed_gpu_side_ends_the_tee_side_with_one_line(
    transport: str, tiny_model: Callable[[str], Path], start_gpu: Callable[..., GpuProcess]
) -> None:
    model = tiny_model("gqa")
    gpu = start_gpu(model)
    flags = ("--model", str(model), "--gpu", gpu.endpoint, "--transport", transport)
    with tee_process(*flags, *GENERATE) as tee:
        tee.wait_for_text()
        gpu.kill()
        killed = time.monotonic()
        ended = tee.end()
        assert time.monotonic() - killed < 2
    assert_one_error(ended, 3, gpu.endpoint)
    assert not shared_memory_names()


def test_a_killed_local_gpu_side_is_started_again_when_asked(tiny_model: Callable[[str], Path]) -> None:
    model = tiny_model("gqa")
    flags = ("--model", str(model), "--prompt", TEXT, "--max-new-tokens", "150", "--temperature", "0", "--ignore-eos")
    with tee_process(*flags, "--reconnect-s", "30") as tee:
        tee.wait_for_text()
        first = tee.local_gpu().pid
        os.kill(first, signal.SIGKILL)
        ended = tee.end()
    undisturbed = run_tee(*flags)
    assert ended.code == undisturbed.code == 0, ended.err
    assert undisturbed.out.endswith(ended.out), "the first byte was read by wait_for_text"
    assert len(ended.out) >= len(undisturbed.out.encode()) - 4


# slots for a few rows of each call: calls wait for slots when the GPU side dies, and are cut where they are made again
@pytest.mark.parametrize(
    "options",
    [
        {"transport": "shm"},
        {"transport": "binary"},
        {"partition": "per-op", "slot_bytes": 200 << 10, "chunk_tokens": 8, "lanes": 3},
        {"partition": "fused-layer", "chunk_tokens": 8, "lanes": 4},
    ],
)
def test_a_gpu_side_that_comes_back_changes_no_token(
    options: dict[str, Any], tiny_model: Callable[[str], Path], start_gpu: Callable[..., GpuProcess]
) -> None:
    """Several answers at once, and the GPU side killed with all of them on their way."""
    model = tiny_model("gqa")
    prompts = [PROMPT, PROMPT[:20], [1, *range(500, 700)]]

    async def run() -> None:
        gpu = start_gpu(model)
        began = asyncio.Event()

        async def answer(prompt: list[int], new_tokens: int) -> list[int]:
            tokens = []
            async for piece in engine.generate(prompt, max_new_tokens=new_tokens, temperature=0, ignore_eos=True):
                tokens.append(piece.token_id)
                if len(tokens) == 8:
                    began.set()
            return tokens

        async with asynctsqp.Engine.connect(model, gpu.endpoint, reconnect_s=30, **options) as engine:
            expected = await asyncio.gather(*(answer(prompt, 48) for prompt in prompts))
            began.clear()
            again = asyncio.gather(*(answer(prompt, 48) for prompt in prompts))
            await began.wait()
            await asyncio.to_thread(gpu.kill)
            await asyncio.to_thread(start_gpu, model, "--bind", gpu.endpoint)
            assert await again == expected
            assert not shared_memory_names()

    asyncio.run(run())


def test_a_gpu_side_lost_between_two_answers_is_found_again(
    tiny_model: Callable[[str], Path], start_gpu: Callable[..., GpuProcess]
) -> None:
    model = tiny_model("gqa")

    async def run() -> None:
        gpu = start_gpu(model)
        async with asynctsqp.Engine.connect(model, gpu.endpoint, reconnect_s=30) as engine:
            before = await engine.complete(PROMPT, max_new_tokens=8, temperature=0)
            await asyncio.to_thread(gpu.kill)
            await asyncio.sleep(0.5)
            await asyncio.to_thread(start_gpu, model, "--bind", gpu.endpoint)
            assert (await engine.complete(PROMPT, max_new_tokens=8, temperature=0)).token_ids == before.token_ids

    asyncio.run(run())


def test_a_gpu_side_that_does_not_come_back_in_time_is_lost(
    tiny_model: Callable[[str], Path], start_gpu: Callable[..., GpuProcess]
) -> None:
    async def run() -> None:
        gpu = start_gpu(tiny_model("gqa"))
        async with asynctsqp.Engine.connect(tiny_model("gqa"), gpu.endpoint, reconnect_s=1) as engine:
            await engine.complete(PROMPT, max_new_tokens=2, temperature=0)
            await asyncio.to_thread(gpu.kill)
            for _ in range(2):
                with pytest.raises(asynctsqp.GpuSideError):
                    await engine.complete(PROMPT, max_new_tokens=2, temperature=0)
            await asyncio.to_thread(start_gpu, tiny_model("gqa"), "--bind", gpu.endpoint)
            await engine.complete(PROMPT, max_new_tokens=2, temperature=0)

    asyncio.run(run())


def test_a_gpu_side_that_comes_back_with_another_model_is_refused(
    tiny_model: Callable[[str], Path], start_gpu: Callable[..., GpuProcess]
) -> None:
    async def run() -> None:
        gpu = start_gpu(tiny_model("gqa"))
        async with asynctsqp.Engine.connect(tiny_model("gqa"), gpu.endpoint, reconnect_s=30) as engine:
            await engine.complete(PROMPT, max_new_tokens=2, temperature=0)
            await asyncio.to_thread(gpu.kill)
            await asyncio.to_thread(start_gpu, tiny_model("biases"), "--bind", gpu.endpoint)
            with pytest.raises(asynctsqp.BadInputError, match="another model"):
                await engine.complete(PROMPT, max_new_tokens=2, temperature=0)

    asyncio.run(run())


@pytest.mark.parametrize("transport", ["shm", "binary"])
def test_a_lost_gpu_side_fails_every_answer_and_the_next_one(
    transport: str, tiny_model: Callable[[str], Path], start_gpu: Callable[..., GpuProcess]
) -> None:
    model = tiny_model("gqa")

    async def run() -> None:
        gpu = start_gpu(model)
        async with asynctsqp.Engine.connect(model, gpu.endpoint, transport=transport) as engine:
            answers = [
                asyncio.ensure_future(engine.complete(PROMPT, max_new_tokens=TOKENS, temperature=0, ignore_eos=True))
                for _ in range(4)
            ]
            await asyncio.sleep(0.3)
            gpu.process.kill()
            for outcome in await asyncio.wait_for(asyncio.gather(*answers, return_exceptions=True), 2):
                assert isinstance(outcome, asynctsqp.GpuSideError)
            with pytest.raises(asynctsqp.GpuSideError):
                await asyncio.wait_for(engine.complete(PROMPT, max_new_tokens=1), 2)

    asyncio.run(run())


class LostRightAfterTheAnswer:
    """A session (link.Session) whose memory another lane has given back by the time the caller looks at its answer."""

    device = "cpu"

    def __init__(self, plans: Plans, breaks: bool) -> None:
        self.plans = plans
        self.connection = self.carrier = self
        self._breaks = breaks
        self._lost = False

    def check(self) -> None:
        if self._lost:
            raise GpuSideLost("lost")

    def next_call_id(self) -> int:
        return 1

    def put(self, call: Call, layout: Any, inputs: Any) -> tuple[Call, tuple[()]]:
        return call, ()

    def call(self, call_id: int, message: Call, frames: Any, settled: Callable[[], None]) -> asyncio.Future[Any]:
        future = asyncio.get_running_loop().create_future()
        settled()
        future.set_result((Done(call_id, 0.0, 0.0), None, 0.0))
        self._lost = self._breaks
        return future

    async def answer(self, reply: asyncio.Future[Any]) -> Any:
        return await reply

    def take(self, call: Call, layout: Any, answer: Done, frame: None, outputs: tuple[np.ndarray]) -> None:
        if self._lost:
            raise ValueError("buffer is smaller than requested size")
        outputs[0][:] = 7


def test_an_answer_whose_memory_is_gone_is_asked_for_again(tiny_model: Callable[[str], Path]) -> None:
    """Not an error of its own: the answer came, and in the same moment another lane began a new connection."""
    plans = Plans(Layouts(ModelSpec.read(tiny_model("gqa") / "config.json"), torch.float32), 1 << 20)
    sessions = [LostRightAfterTheAnswer(plans, breaks) for breaks in (True, False)]
    link: Any = SimpleNamespace(session=sessions[0])

    async def recover(failed: Any, loss: GpuSideLost) -> None:
        assert failed is sessions[0]
        link.session = sessions[1]

    link.recover = recover

    async def work() -> np.ndarray:
        offload = Offload(link, Lane(0, 2), Clear(), RpcTotals(), None, Meter())
        return await offload.linear(Op.O, 0, np.ones((1, 64), np.float32))

    assert (asyncio.run(work()) == 7).all()
