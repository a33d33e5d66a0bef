"""Programs on a CUDA device: the CPU's results, in order, side by side."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.errors import SharedMemoryError
from asynctsqp.layouts import OPERATIONS
from asynctsqp.model_spec import Op
from asynctsqp.shm import Region
from gpu_side.cuda import CudaExecutor
from gpu_side.device import choose
from gpu_side.executor import Tensors
from gpu_side.programs import FloatPrograms
from gpu_side.weights import Weights
from tests.devices import needs_cuda
from tests.gpu_clients import SLOT_BYTES, Tee, calls

FLOAT32 = {"rtol": 1e-4, "atol": 1e-4}
A_SECOND = 1_500_000_000  # in a device's clock cycles, more or less


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


async def ask_three_times(tee: Tee, expected: Callable[..., Tensors]) -> None:
    """As it is, recorded and replayed, or replayed: each time what the CPU makes of it."""
    for _ in range(3):
        given, made = await tee.ask(Op.O_MLP, 0, 1, 0, 0, 0)
        torch.testing.assert_close(made, expected("fused", Op.O_MLP, 0, given, made), **FLOAT32)


@needs_cuda
def test_recordings_outlive_another_client(
    cuda: CudaExecutor, checkpoint: Checkpoint, expected: Callable[..., Tensors]
) -> None:
    async def run() -> None:
        async with attached("fused", checkpoint, cuda) as staying:
            await ask_three_times(staying, expected)
            async with attached("fused", checkpoint, cuda) as leaving:
                await ask_three_times(leaving, expected)
                assert recordings(cuda) == 2
            assert recordings(cuda) == 1
            torch.cuda.empty_cache()  # what the other's recordings held is really gone
            taken = torch.full((1 << 26,), 7.0, device=cuda.device)
            await ask_three_times(staying, expected)
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
            await ask_three_times(staying, expected)
            for _ in range(40):
                async with attached("fused", checkpoint, cuda) as leaving:
                    await ask_three_times(leaving, expected)
                torch.cuda.empty_cache()
            assert recordings(cuda) == 1
            await ask_three_times(staying, expected)

    asyncio.run(run())


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
