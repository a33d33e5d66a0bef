"""`python -m tests.scoring_peaks MODEL ENDPOINT`: bytes that a prompt's log-probabilities take at most, and its logits.

By the operating system's account of a process of its own: in one that has freed much, new memory cannot be seen.
"""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

from asynctsqp import Engine

PROMPT = [1, *range(100, 600)]


def peak_bytes() -> int:
    """The most memory that this process has held since the last `reset_peak`."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise SystemExit("this system keeps no such account")
    return int(found[1]) << 10


def reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


async def peaks(model: Path, endpoint: str) -> tuple[int, int]:
    async with Engine.connect(model, endpoint, chunk_tokens=16) as engine:
        await engine.score(PROMPT, top=5)
        before = reset_peak()
        await engine.score(PROMPT, top=5)
        scored = peak_bytes() - before
        before = reset_peak()
        await engine.logits(PROMPT)
        return scored, peak_bytes() - before


if __name__ == "__main__":
    print(*asyncio.run(peaks(Path(sys.argv[1]), sys.argv[2])))
