"""A GPU side process and a CUDA device: transformers' answers, its end with the device, its refusal without one."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import asynctsqp
from asynctsqp.errors import BadInputError
from asynctsqp.layouts import OPERATIONS
from gpu_side.device import choose
from tests import devices
from tests.conftest import ROOT, GpuProcess
from tests.devices import PRESENT, needs_cuda
from tests.test_parity import reference

PROMPT = [1, *range(100, 300, 2)]


@pytest.mark.skipif(PRESENT, reason="there is a CUDA device")
def test_without_a_device_cuda_is_refused() -> None:
    with pytest.raises(BadInputError, match="no cuda here"):
        choose("cuda", 1)
    assert choose("auto", 1).device == torch.device("cpu")


def test_a_device_too_many_is_refused() -> None:
    with pytest.raises(BadInputError, match="no cuda:99 here"):
        choose("cuda:99", 1)


def test_the_command_refuses_it_in_one_line(tiny_model: Callable[[str], Path]) -> None:
    command = [sys.executable, "-m", "asynctsqp.gpu", "--model", str(tiny_model("gqa")), "--device", "cuda:99"]
    done = subprocess.run([*command, "--bind", "tcp://127.0.0.1:0"], capture_output=True, text=True, timeout=110)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("asynctsqp.gpu: error: there is no cuda:99 here")
    assert done.stderr.count("\n") == 1


@needs_cuda
def test_a_device_that_fails_for_good_ends_the_process(tiny_model: Callable[[str], Path]) -> None:
    """An assertion of a kernel is such an error. In a process of its own, which has no device from then on."""
    code = """
import asyncio, torch
from gpu_side.device import choose
executor = choose("cuda", 1)
def fail(inputs, outputs):
    torch.zeros(4, device=executor.device)[torch.full((1,), 9, device=executor.device)] += 1
try:
    asyncio.run(executor.run(fail, (), (), True, "a"))
finally:
    executor.forget(["a"])
"""
    with devices.shown():
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 1
    assert "DeviceLost: the device fails every call from here on" in done.stderr


@needs_cuda
@pytest.mark.parametrize("transport", ["shm", "binary"])
@pytest.mark.parametrize("partition", OPERATIONS)
def test_answers_are_transformers_own(
    partition: str,
    transport: str,
    tiny_model: Callable[[str], Path],
    start_gpu: Callable[..., GpuProcess],
) -> None:
    model = tiny_model("gqa")
    gpu = start_gpu(model, "--device", "cuda")

    async def run() -> list[list[int]]:
        options = {"partition": partition, "transport": transport}
        async with asynctsqp.Engine.connect(model, gpu.endpoint, **options) as engine:
            return [
                (await engine.complete(PROMPT, max_new_tokens=24, temperature=0, ignore_eos=True)).token_ids
                for _ in range(2)  # the second time all is replayed
            ]

    assert asyncio.run(run()) == [reference(model, PROMPT, 24)] * 2


@needs_cuda
def test_requests_side_by_side_and_one_after_another_client(
    demo_model: Path, start_gpu: Callable[..., GpuProcess]
) -> None:
    gpu = start_gpu(demo_model, "--device", "cuda")
    prompts = [PROMPT, [*PROMPT, 400, 401], PROMPT[:7]]

    async def run() -> list[list[int]]:
        found = []
        for _ in range(2):
            async with asynctsqp.Engine.connect(demo_model, gpu.endpoint) as engine:
                answers = await asyncio.gather(
                    *(engine.complete(prompt, max_new_tokens=16, temperature=0, ignore_eos=True) for prompt in prompts)
                )
                found += [answer.token_ids for answer in answers]
        return found

    assert asyncio.run(run()) == [reference(demo_model, prompt, 16) for prompt in prompts] * 2
