"""What is chosen for where the products are computed: chunks, lanes, slots and how many requests go together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.config import EngineOptions
from asynctsqp.layouts import Layouts
from asynctsqp.limits import DECODE_ROWS, MOST_PORTIONS
from tee_side.room import Room, policy
from tee_side.scheduler import Policy, Scheduler

OPTIONS = EngineOptions()


@pytest.fixture
def room_for(demo_model: Path) -> Callable[..., Room]:
    spec = Checkpoint(demo_model).spec

    def make(device: str, **options: Any) -> Room:
        return Room.of(spec, Layouts(spec, torch.float32), replace(OPTIONS, **options), device)

    return make


def test_a_prompt_is_one_chunk_on_a_cpu_and_several_on_a_gpu_all_in_flight(room_for: Callable[..., Room]) -> None:
    """So that there is something to compute there while the TEE side works."""

    def chunks(device: str) -> list[int]:
        room = room_for(device)
        scheduler: Scheduler[str] = Scheduler(policy(OPTIONS, room, device, "doorbell"))
        scheduler.add("a", range(1024))
        lengths = [len(portion.tokens) for batch in iter(scheduler.next, []) for portion in batch]
        assert len(lengths) <= room.lanes
        return lengths

    assert chunks("cpu") == [1024]
    assert chunks("cuda:0") == [256] * 4


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_a_slot_takes_a_chunk(device: str, room_for: Callable[..., Room], demo_model: Path) -> None:
    """Of the widest product of a layer, float32."""
    room, widest = room_for(device), 2 * Checkpoint(demo_model).spec.intermediate_size * 4
    assert room.chunk_tokens * widest <= room.slot_bytes < 2 * room.chunk_tokens * widest


@pytest.mark.parametrize(
    ("lanes", "transport", "decode_lanes"),
    [
        (None, "doorbell", 1),
        (None, "shm", 1),
        (None, "binary", 2),
        (None, "msgpack", 2),
        (1, "binary", 1),
        (2, "doorbell", 2),
        (8, "doorbell", 2),
    ],
)
def test_decodes_are_in_two_batches_where_the_gpu_is_far_or_lanes_are_asked_for(
    lanes: int | None, transport: str, decode_lanes: int, room_for: Callable[..., Room]
) -> None:
    options = replace(OPTIONS, lanes=lanes)
    for device, expected in (
        ("cuda:0", Policy(256, MOST_PORTIONS, decode_lanes)),
        ("cpu", Policy(1024, DECODE_ROWS, 1)),
    ):
        assert policy(options, room_for(device, lanes=lanes), device, transport) == expected


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_what_is_asked_for_is_done(device: str, room_for: Callable[..., Room]) -> None:
    room = room_for(device, chunk_tokens=77, lanes=3)
    assert (room.lanes, policy(OPTIONS, room, device, "shm").chunk_tokens) == (3, 77)


@pytest.mark.parametrize("partition", ["per-op", "batched"])
def test_partitions_that_send_scores_run_one_request_at_a_time(partition: str, room_for: Callable[..., Room]) -> None:
    room = room_for("cuda:0", partition=partition)
    assert room.lanes == 1
    assert policy(replace(OPTIONS, partition=partition), room, "cuda:0", "doorbell").most_portions == 1
