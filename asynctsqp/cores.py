"""How the two sides share one machine's cores."""

from __future__ import annotations

import os
from dataclasses import dataclass

from asynctsqp.config import EngineOptions

ENOUGH = 4  # cores from which one can be given to polling


@dataclass(frozen=True)
class Cores:
    """threads: for each side's tensor work, since the sides take turns. may_spin: the TEE side polls for answers."""

    threads: int
    may_spin: bool

    @classmethod
    def plan(cls, options: EngineOptions) -> Cores:
        """What the options say, else what fits the cores that this process may use.

        With few cores every one of them is worth more to the product that is waited for than to the waiting: the
        TEE side sleeps then, and is woken. With more, each side leaves one core to the other's polling.
        """
        cores = len(os.sched_getaffinity(0))
        spare = cores >= ENOUGH
        threads = options.threads or (cores - 1 if spare else cores)
        return cls(threads, {"on": True, "off": False, "auto": spare}[options.doorbell])
