"""Calls that come again: what is kept of them, and that they are what the GPU side takes them for. No device needed."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.errors import SharedMemoryError
from asynctsqp.layouts import OPERATIONS
from asynctsqp.limits import DECODE_ROWS
from asynctsqp.messages import Call
from asynctsqp.model_spec import Op
from asynctsqp.shm import Region
from gpu_side import client
from gpu_side.cpu import CpuExecutor
from gpu_side.executor import Program, Tensors, Times
from gpu_side.graphs import Graphs
from gpu_side.streams import Streams
from gpu_side.weights import Weights
from tests.gpu_clients import LANES, Tee, calls

FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}


class Fake:
    """Work that says what it does; a recording of it where `of` is given."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log = log
        self.name = name
        self.start = self.end = None

    def queue(self) -> None:
        self.log.append(self.name)

    def destroy(self) -> None:
        self.log.append(f"destroy {self.name}")


@pytest.fixture
def log() -> list[str]:
    return []


def graphs(log: list[str], most: int = 100, failing: tuple[str, ...] = ()) -> Graphs:
    def record(lane: object, work: Any) -> Any:
        log.append(f"record {work.name} on {lane}")
        if lane in failing:
            raise RuntimeError("no room")
        return Fake(log, f"graph of {work.name}")

    return Graphs(record, most)


def runs(found: Graphs, log: list[str], lane: str, call: str | None, times: int = 1) -> list[str]:
    """What is done for a call that comes so many times."""
    log.clear()
    for _ in range(times):
        found.queue(lane, call, partial(Fake, log, str(call)))
    return log.copy()


def test_the_first_time_as_it_is_the_second_recorded_and_then_replayed(log: list[str]) -> None:
    found = graphs(log)
    assert runs(found, log, "a", "q", 4) == ["q", "record q on a", *["graph of q"] * 3]
    assert runs(found, log, "b", "q", 2) == ["q", "record q on b", "graph of q"]
    assert runs(found, log, "a", "k", 1) == ["k"]
    assert runs(found, log, "a", "q", 1) == ["graph of q"]


def test_what_will_not_come_again_is_not_kept(log: list[str]) -> None:
    assert runs(graphs(log), log, "a", None, 3) == ["None"] * 3


def test_once_one_cannot_be_recorded_no_other_is_tried(log: list[str], caplog: pytest.LogCaptureFixture) -> None:
    found = graphs(log, failing=("a",))
    assert runs(found, log, "b", "q", 2) == ["q", "record q on b", "graph of q"]
    assert runs(found, log, "a", "q", 3) == ["q", "record q on a", "q", "q"]
    assert runs(found, log, "a", "k", 3) == runs(found, log, "b", "k", 3) == ["k"] * 3
    assert runs(found, log, "b", "q", 1) == ["graph of q"], "what was recorded before stays"
    assert caplog.text.count("no room") == 1


def test_what_failed_the_first_time_has_not_been_run(log: list[str]) -> None:
    class Failing(Fake):
        def queue(self) -> None:
            raise RuntimeError("out of memory")

    found = graphs(log)
    with pytest.raises(RuntimeError):
        found.queue("a", "q", lambda: Failing(log, "q"))
    assert runs(found, log, "a", "q", 3) == ["q", "record q on a", "graph of q", "graph of q"]


def test_streams_are_shared_only_when_there_are_no_more() -> None:
    """torch's own: 32, in turn."""
    turn = itertools.count()
    streams = Streams(lambda: next(turn) % 32)
    staying, _ = streams.take()
    for _ in range(100):  # clients of four lanes, one after another
        taken = [streams.take() for _ in range(4)]
        assert all(alone for _, alone in taken)
        assert len({staying, *(stream for stream, _ in taken)}) == 5
        for stream, _ in taken:
            streams.give_back(stream)
    many = [streams.take() for _ in range(40)]
    assert sum(alone for _, alone in many) == 31
    shared = [stream for stream, alone in many if not alone]
    assert len(shared) == 9
    streams.give_back(shared[0])  # its other lane has it still
    assert not streams.take()[1]


def test_other_errors_are_not_hidden(log: list[str]) -> None:
    def record(lane: object, work: Any) -> Any:
        raise TypeError

    found = Graphs(record)
    runs(found, log, "a", "q")
    with pytest.raises(TypeError):
        runs(found, log, "a", "q")


def test_there_is_a_most(log: list[str]) -> None:
    found = graphs(log, most=2)
    assert runs(found, log, "a", "q", 2)[-1] == runs(found, log, "b", "q", 2)[-1] == "graph of q"
    assert runs(found, log, "a", "k", 4) == ["k"] * 4
    assert runs(found, log, "a", "q", 1) == ["graph of q"]


def test_a_forgotten_lane_gives_everything_back(log: list[str]) -> None:
    found = graphs(log, most=2)
    runs(found, log, "a", "q", 2)
    runs(found, log, "b", "q", 2)
    log.clear()
    found.forget("a")
    assert log == ["destroy graph of q"]
    found.forget("a")
    found.forget("never seen")
    assert log == ["destroy graph of q"]
    assert runs(found, log, "a", "k", 2) == ["k", "record k on a", "graph of k"]
    assert runs(found, log, "b", "q", 1) == ["graph of q"]


class Remembering(CpuExecutor):
    """What a replay does: for a call that comes again, the program and the tensors of the first time."""

    def __init__(self) -> None:
        super().__init__(1)
        self.first: dict[object, tuple[Program, Tensors, Tensors]] = {}
        self.seen: list[object] = []

    async def run(
        self, program: Program, inputs: Tensors, outputs: Tensors, short: bool, lane: object, repeats: object = None
    ) -> Times:
        self.seen.append(repeats)
        if repeats is not None:
            program, inputs, outputs = self.first.setdefault((lane, repeats), (program, inputs, outputs))
        return await super().run(program, inputs, outputs, short, lane, repeats)


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Callable[[str], Path]) -> Checkpoint:
    return Checkpoint.find(str(tiny_model("gqa")))


@pytest.fixture(scope="module")
def weights(checkpoint: Checkpoint) -> Weights:
    return Weights(checkpoint, "float32", torch.device("cpu"))


@pytest.mark.parametrize("most_kept", [client.MOST_KEPT, 2])
@pytest.mark.parametrize("partition", OPERATIONS)
def test_what_is_promised_to_repeat_does(
    partition: str, most_kept: int, checkpoint: Checkpoint, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All calls three times, over new inputs, on an executor that computes only what it was given first."""
    monkeypatch.setattr(client, "MOST_KEPT", most_kept)

    async def run() -> Remembering:
        executor = Remembering()
        tee = Tee(partition, checkpoint, weights, executor)
        try:
            tee.attach()
            for _ in range(3):
                for op, layer in calls(checkpoint, partition):
                    for lane, slot in ((0, 0), (0, 1), (1, 0)):
                        keys = 5 if op in (Op.QK, Op.AV) else 0
                        given, made = await tee.ask(op, layer, 1, keys, lane, slot)
                        expected = tuple(torch.full_like(tensor, torch.nan) for tensor in made)
                        tee.client._programs.of(op, layer)(given, expected)
                        torch.testing.assert_close(made, expected, **FLOAT32)
        finally:
            await tee.close()
        return executor

    executor = asyncio.run(run())
    single = sum(op not in (Op.QK, Op.AV, Op.EMBEDDING) for op, _ in calls(checkpoint, partition))
    assert len(executor.first) == 3 * single > 0


def test_calls_of_other_sizes_do_not_repeat(checkpoint: Checkpoint, weights: Weights) -> None:
    """A small decode step's call has its place in a slot; a larger one is not recorded, one in a message has none."""

    async def run() -> list[object]:
        executor = Remembering()
        tee = Tee("batched", checkpoint, weights, executor)
        try:
            tee.attach()
            for op, rows, keys in ((Op.O, DECODE_ROWS + 1, 0), (Op.QK, 1, 3), (Op.EMBEDDING, 1, 0), (Op.O, 100, 0)):
                await tee.ask(op, 0, rows, keys, 0, 0)
            await tee.client.serve(Call(3, Op.O, 0, 1, 0, 0, 0), memoryview(bytearray(64 * 4)))
        finally:
            await tee.close()
        return executor.seen

    assert asyncio.run(run()) == [None] * 5


def test_a_region_that_the_device_cannot_use_is_refused(checkpoint: Checkpoint, weights: Weights) -> None:
    class Without(CpuExecutor):
        def pin(self, region: Region) -> None:
            raise SharedMemoryError("the device cannot use the region")

        def unpin(self, region: Region) -> None:
            pytest.fail("it was never pinned")

    async def run() -> None:
        tee = Tee("shielded", checkpoint, weights, Without(1))
        try:
            with pytest.raises(SharedMemoryError, match="the device"):
                tee.attach()
            _, answer = await tee.client.serve(Call(3, Op.O, 0, 1, 0, 0, 0), memoryview(bytearray(64 * 4)))
            assert answer is not None
            assert len(answer) == 64 * 4
        finally:
            await tee.close()

    asyncio.run(run())


def test_lanes_are_forgotten_before_the_region_is_unpinned(checkpoint: Checkpoint, weights: Weights) -> None:
    order: list[str] = []

    class Noting(CpuExecutor):
        def unpin(self, region: Region) -> None:
            order.append("unpin")

        def forget(self, lanes: list[object]) -> None:
            order.append("forget")
            assert len({hash(lane) for lane in lanes}) == len(lanes) >= LANES

    async def run() -> None:
        tee = Tee("shielded", checkpoint, weights, Noting(1))
        tee.attach()
        await tee.close()

    asyncio.run(run())
    assert order == ["forget", "unpin"]
