"""What a result must say about where it was measured."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

VECTOR = ("avx", "fma", "f16c", "amx")  # how the kernel's names of such instructions begin


def describe() -> dict[str, str | int | float]:
    """Processor, memory, versions, date, how busy the machine was before the run, and which code was measured."""
    return {
        **_cpu(),
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


def _cpu() -> dict[str, str]:
    """A hypervisor may hide the name; what products are made with follows from the other two."""
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    first: dict[str, str] = {}
    for name, _, value in lines:
        first.setdefault(name.strip(), value.strip())
    return {
        "cpu": first.get("model name") or platform.processor() or platform.machine(),
        "cpu_family_model": f"{first.get('cpu family', '?')}.{first.get('model', '?')}",
        "vector_instructions": " ".join(flag for flag in first.get("flags", "").split() if flag.startswith(VECTOR)),
    }


def _commit() -> str:
    """Of the checkout, with -dirty for changes that are not committed; 'unknown' outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
