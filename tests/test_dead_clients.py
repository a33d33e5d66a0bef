"""A GPU side that outlives its clients keeps nothing of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.conftest import GpuProcess
from tests.processes import ROOT, mapped_regions, open_files, shared_memory_names, wait_until

MIB = 1 << 20

HUNDRED_VICTIMS = """
import asyncio, os, signal, sys
import numpy as np
import torch
from pathlib import Path
from asynctsqp.checkpoint import Checkpoint
from asynctsqp.config import EngineOptions
from asynctsqp.layouts import Layouts
from asynctsqp.model_spec import Op
from tee_side.lanes import Lane
from tee_side.link import Link
from tee_side.meter import Meter
from tee_side.offload import Offload
from tee_side.request import RpcTotals
from tee_side.room import Room
from tee_side.seals import Clear

endpoint, model, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
checkpoint = Checkpoint(model)

async def address():
    return endpoint

async def live_and_die():
    options = EngineOptions(transport="shm", lanes=2)
    layouts = Layouts(checkpoint.spec, torch.float32)
    link = await Link.open(address, checkpoint, options, layouts, lambda device: Room(2, 2, 1 << 20, 1024), Clear())
    gpu = Offload(link, Lane(0, 2), Clear(), RpcTotals(), None, Meter())
    for rows in (1, 700):
        await gpu.linear(Op.QKV, 0, np.ones((rows, 64), np.float32))
    asyncio.get_running_loop().call_later(0.001, os.kill, os.getpid(), signal.SIGKILL)
    while True:  # killed with calls on their way
        await gpu.linear(Op.GATE_UP, 1, np.ones((700, 64), np.float32))

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
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr


def test_a_hundred_killed_tee_sides_leave_the_gpu_side_as_it_was(
    tiny_model: Callable[[str], Path], start_gpu: Callable[..., GpuProcess]
) -> None:
    model = tiny_model("gqa")
    gpu = start_gpu(model)
    process = psutil.Process(gpu.process.pid)
    # Warms it up: threads, caches, and the allocator's pools, which hold as many clients as were ever known at once.
    kill_tee_sides(200, gpu.endpoint, model)
    assert wait_until(lambda: mapped_regions(process.pid) == 0)
    resident, files, threads = process.memory_info().rss, open_files(process.pid), process.num_threads()
    kill_tee_sides(100, gpu.endpoint, model)
    assert wait_until(lambda: mapped_regions(process.pid) == 0), "regions of dead clients are still mapped"
    assert wait_until(lambda: open_files(process.pid) <= files), "descriptors leaked"
    assert process.num_threads() <= threads
    assert process.memory_info().rss - resident < 4 * MIB, "a hundred regions were 800 MiB"
    assert not shared_memory_names()
