"""What a result must say about where it was measured."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path


def describe() -> dict[str, str | int | float]:
    """Processor, memory, versions, date, how busy the machine was before the run, and which code was measured."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 0,
        "cores_used": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def summary(machine: dict[str, str | int | float]) -> str:
    """One line of it."""
    memory = int(machine["memory_bytes"]) / (1 << 30)
    return (
        f"{machine['cpu']}, {machine['cores_used']} of {machine['cores']} cores, {memory:.0f} GiB, "
        f"torch {machine['torch']}, transformers {machine['transformers']}, load {machine['load_average']:.1f}"
    )


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Of the checkout, with -dirty for changes that are not committed; 'unknown' outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
