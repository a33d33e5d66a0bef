"""The GPU side on a CUDA device: the CPU's results, in order, side by side; and its refusal where there is none."""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch

import asynctsqp
from asynctsqp.checkpoint import Checkpoint
from asynctsqp.errors import BadInputError, SharedMemoryError
from asynctsqp.layouts import OPERATIONS
from asynctsqp.model_spec import Op
from asynctsqp.shm import Region
from gpu_side.cuda import CudaExecutor
from gpu_side.device import choose
from gpu_side.executor import Tensors
from gpu_side.programs import FloatPrograms
from gpu_side.weights import Weights
from tests import devices
from tests.conftest import ROOT, GpuProcess
from tests.gpu_clients import SLOT_BYTES, Tee, calls
from tests.test_parity import reference

PRESENT = torch.cuda.is_available()
needs_cuda = pytest.mark.skipif(not PRESENT, reason="torch sees no CUDA device here")
FLOAT32 = {"rtol": 1e-4, "atol": 1e-4}
A_SECOND = 1_500_000_000  # in a device's clock cycles, more or less
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


@pytest.fixture
def cuda() -> Iterator[CudaExecutor]:
    executor = choose("cuda", 1)
    assert isinstance(executor, CudaExecutor)
    yield executor
    torch.cuda.synchronize()
    assert not executor._lanes, "a test left lanes behind"


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Callable[[str], Path]) -> Checkpoint:
    return Checkpoint.find(str(tiny_model("gqa")))


@pytest.fixture
def expected(checkpoint: Checkpoint) -> Callable[[str, Op, int, Tensors, Tensors], Tensors]:
    """partition, operation, layer, inputs, outputs -> what the CPU makes of the inputs."""
    weights = Weights(checkpoint, "float32", torch.device("cpu"))

    def compute(partition: str, op: Op, layer: int, inputs: Tensors, outputs: Tensors) -> Tensors:
        weights.prepare(partition)
        made = tuple(torch.empty_like(tensor) for tensor in outputs)
        FloatPrograms(checkpoint.spec, weights).of(op, layer)(inputs, made)
        return made

    return compute


@asynccontextmanager
async def attached(partition: str, checkpoint: Checkpoint, executor: CudaExecutor) -> AsyncIterator[Tee]:
    tee = Tee(partition, checkpoint, Weights(checkpoint, "float32", executor.device), executor)
    try:
        tee.attach()
        yield tee
    finally:
        await tee.close()


def recordings(executor: CudaExecutor) -> int:
    return sum(len(lane.recordings) for lane in executor._graphs._lanes.values())


@needs_cuda
@pytest.mark.parametrize("partition", OPERATIONS)
def test_every_operation_gives_the_cpu_s_results(
    partition: str,
    cuda: CudaExecutor,
    checkpoint: Checkpoint,
    expected: Callable[..., Tensors],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One row four times, over new inputs: as it is, recorded, replayed twice. And more rows, short and long."""

    async def run() -> int:
        async with attached(partition, checkpoint, cuda) as tee:
            for rows in (1, 1, 1, 1, 3, 40):
                for op, layer in calls(checkpoint, partition):
                    keys = 5 if op in (Op.QK, Op.AV) else 0
                    for lane, slot in ((0, 0), (0, 1), (1, 0)):
                        if op is Op.LM_HEAD and rows > 3:  # more than a slot
                            continue
                        given, made = await tee.ask(op, layer, rows, keys, lane, slot)
                        torch.testing.assert_close(made, expected(partition, op, layer, given, made), **FLOAT32)
            return recordings(cuda)

    single = sum(op not in (Op.QK, Op.AV, Op.EMBEDDING) for op, _ in calls(checkpoint, partition))
    assert asyncio.run(run()) == 3 * single
    assert not caplog.records


@needs_cuda
def test_recordings_outlive_another_client(
    cuda: CudaExecutor, checkpoint: Checkpoint, expected: Callable[..., Tensors]
) -> None:
    async def run() -> None:
        async with attached("fused", checkpoint, cuda) as staying:
            for _ in range(3):
                await staying.ask(Op.O_MLP, 0, 1, 0, 0, 0)
            async with attached("fused", checkpoint, cuda) as leaving:
                for _ in range(3):
                    await leaving.ask(Op.O_MLP, 0, 1, 0, 0, 0)
                assert recordings(cuda) == 2
            assert recordings(cuda) == 1
            torch.cuda.empty_cache()  # what the other's recordings held is really gone
            taken = torch.full((1 << 26,), 7.0, device=cuda.device)
            for _ in range(3):
                given, made = await staying.ask(Op.O_MLP, 0, 1, 0, 0, 0)
                torch.testing.assert_close(made, expected("fused", Op.O_MLP, 0, given, made), **FLOAT32)
            assert bool((taken == 7).all())

    asyncio.run(run())
    assert recordings(cuda) == 0


@needs_cuda
def test_clients_that_come_and_go_get_no_stream_of_one_that_stays(
    cuda: CudaExecutor, checkpoint: Checkpoint, expected: Callable[..., Tensors]
) -> None:
    """More lanes than torch has streams, and each leaves with its recordings; memory is tight in between."""

    async def run() -> None:
        async with attached("fused", checkpoint, cuda) as staying:
            for _ in range(3):
                await staying.ask(Op.O_MLP, 0, 1, 0, 0, 0)
            for _ in range(40):
                async with attached("fused", checkpoint, cuda) as leaving:
                    for _ in range(3):
                        await leaving.ask(Op.O_MLP, 0, 1, 0, 0, 0)
                torch.cuda.empty_cache()
            assert recordings(cuda) == 1
            for _ in range(3):
                given, made = await staying.ask(Op.O_MLP, 0, 1, 0, 0, 0)
                torch.testing.assert_close(made, expected("fused", Op.O_MLP, 0, given, made), **FLOAT32)

    asyncio.run(run())


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
def test_many_calls_at_once_on_two_lanes(
    cuda: CudaExecutor, checkpoint: Checkpoint, expected: Callable[..., Tensors]
) -> None:
    """Recorded calls of two lanes run at the same time, and do not share what they compute in."""

    async def run() -> None:
        async with attached("fused-layer", checkpoint, cuda) as tee:
            for _ in range(100):
                places = [(lane, slot) for lane in (0, 1) for slot in (0, 1)]
                found = await asyncio.gather(*(tee.ask(Op.LAYER, 0, 1, 0, *place) for place in places))
                for given, made in found:
                    torch.testing.assert_close(made, expected("fused-layer", Op.LAYER, 0, given, made), **FLOAT32)

    asyncio.run(run())


@needs_cuda
@pytest.mark.parametrize("short", [False, True])
def test_a_lane_s_calls_run_in_order_and_lanes_side_by_side(short: bool, cuda: CudaExecutor) -> None:
    state = torch.zeros(4, device=cuda.device)
    torch.cuda._sleep(1)  # loading a kernel may wait for all that runs: both are loaded now
    state.add_(0)
    torch.cuda.synchronize()

    def slow(inputs: Tensors, outputs: Tensors) -> None:
        torch.cuda._sleep(A_SECOND)
        state.add_(3)

    def read(inputs: Tensors, outputs: Tensors) -> None:
        outputs[0].copy_(state)

    async def run() -> tuple[torch.Tensor, torch.Tensor, list[str], int]:
        ended: list[str] = []
        turns = 0

        async def call(name: str, program: Callable[[Tensors, Tensors], None], outputs: Tensors, lane: object) -> None:
            await cuda.run(program, (), outputs, short, lane)
            ended.append(name)

        async def count() -> None:
            nonlocal turns
            while len(ended) < 3:
                turns += 1
                await asyncio.sleep(0.001)

        after, beside = (cuda.buffer(16).view(torch.float32) for _ in range(2))
        await asyncio.gather(
            call("slow", slow, (), "a"),
            call("after", read, (after,), "a"),
            call("beside", read, (beside,), "b"),
            count(),
        )
        cuda.forget(["a", "b"])
        return after, beside, ended, turns

    after, beside, ended, turns = asyncio.run(run())
    assert after.tolist() == [3.0] * 4
    assert beside.tolist() == [0.0] * 4
    assert ended[0] == "beside"
    assert turns > 20  # the event loop was free all the while


@needs_cuda
def test_times_are_the_program_s_own_on_the_host_s_clock(cuda: CudaExecutor) -> None:
    async def run() -> tuple[float, float, float, float]:
        def nap(inputs: Tensors, outputs: Tensors) -> None:
            torch.cuda._sleep(A_SECOND // 10)

        before = time.perf_counter()
        began, took = await cuda.run(nap, (), (), False, "a")
        after = time.perf_counter()
        cuda.forget(["a"])
        return before, began, took, after

    before, began, took, after = asyncio.run(run())
    assert before - 1e-3 <= began
    assert 0.01 < took <= after - began + 1e-3


@needs_cuda
def test_a_cancelled_call_is_waited_for_before_its_memory_goes(cuda: CudaExecutor, checkpoint: Checkpoint) -> None:
    async def run() -> None:
        async with attached("shielded", checkpoint, cuda) as tee:
            inputs, outputs = tee.client._region.tensors(0, 0, tee._layouts.of(Op.O, 1, 0))  # type: ignore[union-attr]

            def slow(given: Tensors, made: Tensors) -> None:
                torch.cuda._sleep(A_SECOND)
                made[0].fill_(5)

            task = asyncio.create_task(cuda.run(slow, inputs, outputs, False, (tee.client, 0)))
            await asyncio.sleep(0.05)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            mirrored = tee.region.tensors(0, 0, tee._layouts.of(Op.O, 1, 0))[1][0]
            cuda.forget([(tee.client, 0)])
            assert bool((mirrored == 5).all())

    asyncio.run(run())


@pytest.fixture
def region() -> Iterator[Region]:
    made = Region.create(f"/test-asynctsqp-{secrets.token_hex(4)}", 1, 2, SLOT_BYTES)
    made.unlink()
    yield made
    made.close()


@needs_cuda
def test_a_region_is_pinned_and_unpinned(cuda: CudaExecutor, region: Region) -> None:
    for _ in range(2):  # the second time would fail, had the first not been undone
        assert not region.whole().is_pinned()
        cuda.pin(region)
        assert region.whole().is_pinned()
        cuda.unpin(region)
    assert not region.whole().is_pinned()


@needs_cuda
def test_a_failed_registration_is_nobody_else_s_error(
    cuda: CudaExecutor, region: Region, caplog: pytest.LogCaptureFixture
) -> None:
    cuda.pin(region)
    with pytest.raises(SharedMemoryError, match="the device cannot use the region"):
        cuda.pin(region)
    assert torch.ones(3, device=cuda.device).sum().item() == 3
    cuda.unpin(region)
    cuda.unpin(region)
    assert "stays registered" in caplog.text
    assert torch.ones(3, device=cuda.device).sum().item() == 3


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
