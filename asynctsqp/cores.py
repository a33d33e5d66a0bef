"""How the two sides share one machine's cores. No torch here: it reads the environment when it is imported."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

# Of torch's OpenMP (GNU's) and of numpy's OpenBLAS, whose timeout is a power of two, of the processor's cycles: its own
# is 2^26, some twenty milliseconds
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000", "OPENBLAS_THREAD_TIMEOUT": "14"}
FEW = 3  # cores up to which neither side can leave one to the other's polling


def cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def default_threads() -> int:
    """For one side's tensor work, since the sides take turns: all cores, or all but one where there are enough."""
    count = len(cores())
    return count if count <= FEW else count - 1


def openmp(gpu_threads: int | None = None) -> dict[str, str]:
    """The environment of torch's and numpy's threads, for either side; a user's own setting comes first.

    Idle threads spin for some microseconds, so that what follows does not pay a wake-up, and then sleep: the other side
    may need the core.

    gpu_threads: on a GPU side with a thread for each of few cores the threads are bound to them. The TEE side's
    polling then yields its core to the product's thread there; unbound, the scheduler takes the polled core for taken
    and runs two of the product's threads on another.
    """
    settings = WAITING | {"OPENBLAS_NUM_THREADS": "1"}  # numpy's products here are too small for more
    if gpu_threads == len(cores()) <= FEW:
        settings["GOMP_CPU_AFFINITY"] = " ".join(map(str, cores()))
    return settings | os.environ


@contextlib.contextmanager
def idle_threads_sleep() -> Iterator[None]:
    """While torch and numpy are imported into somebody else's process: how their idle threads wait, and nothing else.

    The environment is read then, once; what has been imported before is as it is.
    """
    added = {name: value for name, value in WAITING.items() if name not in os.environ}
    os.environ |= added
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
