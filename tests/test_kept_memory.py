"""Memory that is freed and asked for again, by the operating system's account of page faults."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

PREFILLS = 2

COUNT_FAULTS = """
import asyncio, resource, sys
from asynctsqp import memory
if sys.argv[2] != "kept":
    memory.keep_freed = lambda: None
from asynctsqp import Engine

async def main():
    async with Engine.launch(sys.argv[1]) as engine:
        async def prefills():
            for _ in range(int(sys.argv[3])):
                await engine.complete([*range(100, 1124)], max_new_tokens=1, temperature=0)
        await prefills()
        start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        await prefills()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start)

asyncio.run(main())
"""


def faults(model: Path, way: str) -> float:
    """Of the TEE side's process, in a prefill that is not the first."""
    command = [sys.executable, "-c", COUNT_FAULTS, str(model), way, str(PREFILLS)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=180)
    return int(ended.stdout) / PREFILLS


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_a_prefill_uses_the_pages_of_the_one_before(demo_model: Path) -> None:
    """Tens of MiB go through each layer; otherwise their pages are given back, and zeroed anew when asked for."""
    kept, given_back = faults(demo_model, "kept"), faults(demo_model, "left alone")
    print(f"page faults of a prefill: {kept:.0f} kept, {given_back:.0f} otherwise")
    assert kept < given_back / 2
    assert kept < 1000
