"""What the two copies through shared memory take by themselves: into a slot, and out of it, by one process."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator

import torch

from asynctsqp.layouts import Area, Layout
from asynctsqp.shm import Region

FLOAT_BYTES = 4


def slot_copy(size: int, rounds: int) -> dict[str, float | int]:
    """Median ms of a write and of a read of `size` bytes, one after the other, in memory that has been touched."""
    source, target = torch.rand(1, size // FLOAT_BYTES), torch.rand(1, size // FLOAT_BYTES)
    area = Area((1, size // FLOAT_BYTES), torch.float32, 0, 0)
    layout = Layout((area,), (area,), size, size, reused=True)
    writes, reads = [], []
    with _region(size) as region:
        (slot,), _ = region.tensors(0, 0, layout)
        for _ in range(rounds + 1):
            began = time.perf_counter()
            slot.copy_(source)
            wrote = time.perf_counter()
            target.copy_(slot)
            reads.append(time.perf_counter() - wrote)
            writes.append(wrote - began)
        del slot
    # the first round touches the slot's pages
    return {
        "bytes": size,
        "write_ms": 1e3 * statistics.median(writes[1:]),
        "read_ms": 1e3 * statistics.median(reads[1:]),
    }


@contextlib.contextmanager
def _region(size: int) -> Iterator[Region]:
    region = Region.create(None, 1, 1, -(-size // 4096) * 4096)
    region.unlink()
    try:
        yield region
    finally:
        region.close()
