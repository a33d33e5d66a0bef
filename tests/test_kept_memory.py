"""Memory that is freed and asked for again, by the operating system's account of page faults."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# As the TEE side does it: large activations, in a thread that starts after `keep_freed`.
COUNT_FAULTS = """
import resource, sys, threading
import torch
from asynctsqp.memory import keep_freed
if sys.argv[1] == "kept":
    keep_freed()

def layer():
    held = [torch.ones(1 << 20) for _ in range(3)] + [torch.ones(3 << 20) for _ in range(3)]  # 4 and 12 MiB each
    return len(held)

def work():
    for _ in range(3):
        layer()
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        layer()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start)

torch.set_num_threads(1)
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def faults(way: str) -> int:
    ended = subprocess.run(
        [sys.executable, "-c", COUNT_FAULTS, way], capture_output=True, text=True, check=True, timeout=120
    )
    return int(ended.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_what_is_freed_is_used_again() -> None:
    """Twenty layers' activations are the same pages again; without it each layer's are made anew."""
    kept, given_back = faults("kept"), faults("left alone")
    print(f"page faults: {kept} kept, {given_back} otherwise")
    assert kept < 100
    assert given_back > 10 * kept
