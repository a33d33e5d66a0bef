"""The printed size of an enclave against what the operating system says a TEE side took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.config import EngineOptions
from tee_side.enclave_size import Size
from tests.conftest import ROOT, GpuProcess

SETTINGS: dict[str, Any] = {"protect": "full", "kv_memory": "64M", "mask_memory": "128M", "threads": 2, "lanes": 2}
FLAGS = [word for name, value in SETTINGS.items() for word in ("--" + name.replace("_", "-"), str(value))]

# As the manifest sets it: one arena, so that freed memory is used again
ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_NUM_THREADS": "1"}
WORK = """
import asyncio, sys
import asynctsqp

def mapped_files() -> int:
    total = 0
    for fields in (line.split(None, 5) for line in open("/proc/self/maps")):
        if len(fields) == 6 and fields[5].startswith("/") and not fields[5].startswith("/dev/shm/"):
            start, end = (int(word, 16) for word in fields[0].split("-"))
            total += end - start
    return total

async def main() -> None:
    options = dict(protect="full", kv_memory="64M", mask_memory="128M", threads=2, lanes=2)
    async with asynctsqp.Engine.connect(sys.argv[1], sys.argv[2], **options) as engine:
        await engine.prepare_masks(1 << 20)  # until they fill their memory
        sizes = [1050] + [40] * 4  # all keys and values that fit, prompts on both lanes, a batch of decodes
        await asyncio.gather(*[engine.complete([7] * n, max_new_tokens=16, temperature=0) for n in sizes])

asyncio.run(main())
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(*(status[name].split()[0] for name in ("VmHWM", "RssFile", "Threads")), mapped_files() >> 10)
"""


def printed(model: Path | str, *flags: str) -> dict[str, object]:
    command = [sys.executable, "-m", "tee_side.enclave_size", "--model", str(model), "--json", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | ENVIRONMENT, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_printed_size_is_enough_and_not_twice_what_is_used(
    demo_model: Path, start_gpu: Callable[..., GpuProcess]
) -> None:
    gpu = start_gpu(demo_model)
    command = [sys.executable, "-c", WORK, str(demo_model), gpu.endpoint]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | ENVIRONMENT, timeout=250)
    assert done.returncode == 0, done.stderr
    highest, files, threads, mapped = map(int, done.stdout.split())
    peak = highest - files + mapped << 10  # an enclave holds all of a mapped file
    size = printed(demo_model, *FLAGS)
    print(f"peak {peak >> 20} MiB, printed {int(str(size['needed'])) >> 20} MiB, manifest {size['enclave_size']}")
    assert peak <= int(str(size["needed"])) <= 2 * peak
    assert threads <= int(str(size["max_threads"]))


def test_the_size_grows_with_what_it_is_made_of(demo_model: Path) -> None:
    """Each option moves its own line by what it says."""
    checkpoint = Checkpoint(demo_model)

    def lines(**options: Any) -> tuple[dict[str, int], Size]:
        size = Size.of(checkpoint, EngineOptions(**(SETTINGS | options)))
        return {line.name: line.size for line in size.lines}, size

    before, small = lines()
    after, large = lines(kv_memory="1G", mask_memory="2G", threads=8, lanes=4)
    assert after["keys and values"] - before["keys and values"] == (1024 - 64) << 20
    assert after["masks and their weights"] - before["masks and their weights"] == (2048 - 128) << 20
    checked = 128 * 8 * 3072  # by each thread at a time, whatever the number of lanes
    assert after["working memory"] - 8 * checked == 2 * (before["working memory"] - 2 * checked)
    of_a_row = 20 * 576 + 20 * 49152  # and its scores, of which a batch on a GPU may have 64
    of_a_token = 20 * 576 + 12 * 3072 + 12 * 576
    assert before["working memory"] - 2 * checked == 2 * (256 * of_a_token + 64 * of_a_row)
    assert after["embedding"] == before["embedding"] == 49152 * 576 * 4
    assert large.max_threads - small.max_threads == 4 * (8 - 2)  # three teams of OpenMP's, and rows
    bare = {"protect": "none", "mask_memory": None}
    float32, bfloat16 = (lines(dtype=dtype, **bare)[0]["working memory"] for dtype in ("float32", "bfloat16"))
    assert bfloat16 - float32 == 2 * ((1 << 22) + 2 * 3 * 64 * 8192)  # an attention's scores, keys and values
    slots = 2 * 2 * 2 * 1024 * 3072 * 4  # outside, unless tensors travel as messages
    assert (before["slots"], small.outside) == (0, slots)
    inside, messages = lines(transport="binary")
    assert (inside["slots"], messages.outside) == (slots, 0)
    for size in (small, large, messages):
        assert size.enclave_size.bit_count() == 1
        assert size.enclave_size // 2 < size.needed <= size.enclave_size


def test_a_model_that_is_not_there_is_one_line() -> None:
    command = [sys.executable, "-m", "tee_side.enclave_size", "--model", "/nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
