"""Either side killed with `kill -9`: nothing leaks, the other side says so, and --reconnect-s heals it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import asynctsqp
from tests.conftest import GpuProcess
from tests.processes import (
    ROOT,
    assert_one_error,
    gone,
    mapped_regions,
    open_files,
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


@pytest.mark.parametrize("transport", ["shm", "binary"])
def test_a_gpu_side_that_comes_back_changes_no_token(
    transport: str, tiny_model: Callable[[str], Path], start_gpu: Callable[..., GpuProcess]
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

        options = {"transport": transport, "reconnect_s": 30}
        async with asynctsqp.Engine.connect(model, gpu.endpoint, **options) as engine:
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


HUNDRED_VICTIMS = """
import asyncio, os, signal, sys
import torch
from pathlib import Path
from asynctsqp.checkpoint import Checkpoint
from asynctsqp.config import EngineOptions
from asynctsqp.model_spec import Op
from tee_side.lanes import Lanes
from tee_side.link import Link
from tee_side.offload import Offload
from tee_side.request import RpcTotals

endpoint, model, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
checkpoint = Checkpoint(model)

async def address():
    return endpoint

async def live_and_die():
    options = EngineOptions(transport="shm", lanes=2)
    link = await Link.open(address, checkpoint, options, 2, 1 << 20)
    async with Lanes(2).take() as lane:
        gpu = Offload(link, lane, checkpoint.spec, RpcTotals())
        for rows in (1, 700):
            await gpu.linear(Op.QKV, 0, torch.ones(rows, 64))
        asyncio.get_running_loop().call_later(0.001, os.kill, os.getpid(), signal.SIGKILL)
        while True:  # killed with calls on their way
            await gpu.linear(Op.GATE_UP, 1, torch.ones(700, 64))

for _ in range(count):
    child = os.fork()
    if child == 0:
        try:
            asyncio.run(live_and_die())
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
        sys.exit(f"a victim ended by itself: {status}")
"""


def kill_tee_sides(count: int, endpoint: str, model: Path) -> None:
    """`count` TEE sides, one after another, each killed with a region attached and a call on its way."""
    command = [sys.executable, "-c", HUNDRED_VICTIMS, endpoint, str(model), str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_a_hundred_killed_tee_sides_leave_the_gpu_side_as_it_was(
    tiny_model: Callable[[str], Path], start_gpu: Callable[..., GpuProcess]
) -> None:
    model = tiny_model("gqa")
    gpu = start_gpu(model)
    process = psutil.Process(gpu.process.pid)
    kill_tee_sides(10, gpu.endpoint, model)  # warms it up: threads, caches, pools of the allocator
    assert wait_until(lambda: mapped_regions(process.pid) == 0)
    resident, files, threads = process.memory_info().rss, open_files(process.pid), process.num_threads()
    kill_tee_sides(100, gpu.endpoint, model)
    assert wait_until(lambda: mapped_regions(process.pid) == 0), "regions of dead clients are still mapped"
    assert wait_until(lambda: open_files(process.pid) <= files), "descriptors leaked"
    assert process.num_threads() <= threads
    assert process.memory_info().rss - resident < 8 * MIB, "a hundred regions were 800 MiB"
    assert not shared_memory_names()
