"""What two thousand requests leave behind: nothing."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.conftest import ROOT, GpuProcess

# What each 500 requests after the warm-up may add. A leak of 2 KiB a request would be 1,000 kB in every round, of one
# object 500. What happens once is none: caches that fill late, a new largest batch, one more piece for an allocator.
MOST_GROWTH = {"RssAnon": 500, "objects": 250, "entries": 25, "tasks": 0, "threads": 0, "open files": 0}


def test_two_thousand_requests_leave_nothing(
    tiny_model: Callable[[str], Path], start_gpu: Callable[..., GpuProcess]
) -> None:
    """Of every kind: answered, refused, left early, cancelled at any moment; eight at once."""
    model = tiny_model("1-layers")
    gpu = start_gpu(model)
    command = [sys.executable, "-m", "tests.many_requests", str(model), gpu.endpoint, str(gpu.process.pid)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    rounds = json.loads(done.stdout)
    assert len(rounds) == 5, "the warm-up and four rounds"
    grown = {
        (side, what): min(after[side][what] - before[side][what] for before, after in itertools.pairwise(rounds))
        for side, counts in rounds[0].items()
        for what in counts
    }
    too_much = {key: growth for key, growth in grown.items() if growth > MOST_GROWTH[key[1]]}
    assert not too_much, f"grown: {too_much}, over the rounds: {rounds}"
