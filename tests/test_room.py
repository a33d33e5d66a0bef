"""What is chosen for where the products are computed: chunks, lanes and how many requests go together."""

from __future__ import annotations

from dataclasses import replace

import pytest

from asynctsqp.config import EngineOptions
from asynctsqp.limits import DECODE_ROWS
from tee_side.room import MOST_PORTIONS, Room, policy
from tee_side.scheduler import Policy, Scheduler

ROOM = Room(lanes=2, slots=2, slot_bytes=1 << 20)
OPTIONS = EngineOptions()


def test_a_prompt_is_one_chunk_on_a_cpu_and_several_on_a_gpu() -> None:
    """So that there is something to compute there while the TEE side works."""

    def chunks(device: str) -> list[int]:
        scheduler: Scheduler[str] = Scheduler(policy(OPTIONS, ROOM, device))
        scheduler.add("a", range(1024))
        return [len(portion.tokens) for batch in iter(scheduler.next, []) for portion in batch]

    assert chunks("cpu") == [1024]
    assert chunks("cuda:0") == [256] * 4


@pytest.mark.parametrize(("lanes", "decode_lanes"), [(1, 1), (2, 2), (8, 2)])
def test_decodes_are_in_as_many_batches_as_there_are_sides(lanes: int, decode_lanes: int) -> None:
    room = replace(ROOM, lanes=lanes)
    assert policy(OPTIONS, room, "cuda:0") == Policy(256, MOST_PORTIONS, decode_lanes)
    assert policy(OPTIONS, room, "cpu") == Policy(1024, DECODE_ROWS, 1)


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_what_is_asked_for_is_done(device: str) -> None:
    assert policy(replace(OPTIONS, chunk_tokens=77), ROOM, device).chunk_tokens == 77


@pytest.mark.parametrize("partition", ["per-op", "batched"])
def test_partitions_that_send_scores_run_one_request_at_a_time(partition: str) -> None:
    assert policy(replace(OPTIONS, partition=partition), ROOM, "cuda:0").most_portions == 1
