"""A link on which one tensor takes seconds is slow, and not dead."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import torch

import asynctsqp
from benchmarks.harness import Worker
from tests.conftest import GpuProcess

TOKENS = [1, *range(100, 130)]  # their scores are 6 MB


def test_an_answer_may_take_longer_than_a_heartbeat(tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]) -> None:
    host, _, port = tiny_gpu.endpoint.rpartition(":")

    async def scores(endpoint: str, proxy: Worker | None) -> torch.Tensor:
        async with asynctsqp.Engine.connect(
            tiny_model("gqa"), endpoint, transport="binary", slot_bytes="16M"
        ) as engine:
            if proxy is not None:
                proxy.ask("limit", bits_per_s=7e6)  # some seven seconds
            return await engine.logits(TOKENS)

    with Worker("the proxy", "benchmarks.throttle", {}) as proxy:
        slow = f"{host}:{proxy.ask('open', port=int(port))['port']}"
        assert torch.equal(asyncio.run(scores(slow, proxy)), asyncio.run(scores(tiny_gpu.endpoint, None)))
