"""`--threads` holds for every thread that computes."""

from __future__ import annotations

import asyncio

import pytest
import torch

from gpu_side.cpu import CpuExecutor


@pytest.mark.parametrize("threads", [1, 2])
def test_long_products_have_their_threads(threads: int) -> None:
    seen: list[int] = []

    async def run() -> None:
        executor = CpuExecutor(threads)
        await executor.run(lambda *_: seen.append(torch.get_num_threads()), (), (), False, 0)

    asyncio.run(run())
    assert seen == [threads]
