"""Whom the TEE side connects to, and what is said when nobody is there."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """Whom to connect to. kind: as messages name it; unreachable: what to say, and to do, when nobody is there.

    key: Z85, of a mask peer: who has not the secret to it is not connected to.
    """

    endpoint: str
    kind: str
    unreachable: str
    key: str | None = None

    @classmethod
    def gpu_side(cls, endpoint: str) -> Target:
        advice = f"start one with `python -m asynctsqp.gpu --model MODEL --bind {endpoint}`"
        return cls(endpoint, "GPU side", f"no GPU side answers at {endpoint}: {advice}")

    @classmethod
    def mask_peer(cls, endpoint: str, key: str) -> Target:
        advice = "see that it runs, and that --mask-peer-key is what it printed as mask-peer-key"
        return cls(endpoint, "mask peer", f"no mask peer with that key answers at {endpoint}: {advice}", key)

    def __str__(self) -> str:
        return f"the {self.kind} at {self.endpoint}"
