"""The rungs of benchmarks.ladder, and what is known about the predecessor's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rung:
    """One way to run the engine. `origin` is the rung that it differs from, by one thing: `change`."""

    name: str
    origin: str | None
    change: str
    partition: str
    transport: str
    dtype: str
    doorbell: str

    def options(self) -> dict[str, Any]:
        """Of the engine. One lane: what several are worth is not a matter of one request's calls."""
        return {
            "partition": self.partition,
            "transport": self.transport,
            "doorbell": self.doorbell,
            "lanes": 1,
            "stats": True,
        }


RUNGS = (
    Rung("per-op", None, "the predecessor's first version", "per-op", "msgpack", "float32", "off"),
    Rung("seed", "per-op", "linears batched: its last version", "batched", "msgpack", "float32", "off"),
    Rung("batched-binary", "seed", "raw frames", "batched", "binary", "float32", "off"),
    Rung("batched-binary-bf16", "batched-binary", "bfloat16", "batched", "binary", "bfloat16", "off"),
    Rung("batched-shm", "batched-binary", "shared memory", "batched", "shm", "float32", "off"),
    Rung("batched-shm-bf16", "batched-shm", "bfloat16", "batched", "shm", "bfloat16", "off"),
    Rung("shielded-msgpack", "seed", "attention inside", "shielded", "msgpack", "float32", "off"),
    Rung("shielded-binary", "shielded-msgpack", "raw frames", "shielded", "binary", "float32", "off"),
    Rung("shielded-shm", "shielded-binary", "shared memory", "shielded", "shm", "float32", "off"),
    Rung("shielded", "shielded-shm", "doorbell: the default", "shielded", "shm", "float32", "on"),
    Rung("shielded-bf16", "shielded", "bfloat16", "shielded", "shm", "bfloat16", "on"),
    Rung("fused", "shielded", "two calls a layer", "fused", "shm", "float32", "on"),
    Rung("fused-layer", "fused", "one call a layer", "fused-layer", "shm", "float32", "on"),
    Rung("fused-layer-bf16", "fused-layer", "bfloat16", "fused-layer", "shm", "bfloat16", "on"),
)
REFERENCE = "seed"  # what speed-ups are over, if it is among those that ran

# Its last version on the demo model, on a machine with two cores: a prefill of 1024 tokens
PREDECESSOR_PREFILL = {
    "rung": "seed",
    "tokens": 1024,
    "seconds": 15.7,
    "calls": 182,
    "bytes": 3.4e9,
    "communication_share": 0.82,
}

# What its road map promised for a model of 16 layers, ms per token, and the rung here that does the same
ROAD_MAP = (
    ("msgpack", 332, "seed"),
    ("binary frames", 250, "batched-binary"),
    ("bfloat16", 180, "batched-binary-bf16"),
    ("shared memory instead", 206, "batched-shm"),
    ("shared memory", 50, "batched-shm-bf16"),
    ("fusion, 98 -> 18 RPCs", 50, "fused-layer-bf16"),
    ("a faster GPU side", 10, None),
)
