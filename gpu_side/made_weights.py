"""The weights that clients asked for: each kind made once, however many ask for it at a time."""

from __future__ import annotations

import asyncio

import torch

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.errors import HandshakeRefused
from gpu_side.ring_weights import RingWeights
from gpu_side.weights import Weights

Kind = str | int  # a dtype's name, or the bits of integer weights


class MadeWeights:
    """Of one checkpoint on one device.

    making: held while anything is made, one after another, so that each is checked against the memory that is left.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._device = device
        self._made: dict[Kind, asyncio.Task[Weights | RingWeights]] = {}
        self.making = asyncio.Lock()

    async def of(self, kind: Kind) -> Weights | RingWeights:
        known = self._made.get(kind)
        if known is None or (known.done() and known.exception() is not None):  # a load that failed is tried again
            self._made[kind] = asyncio.create_task(self._make(kind))
        return await asyncio.shield(self._made[kind])

    async def ring(self, bits: int, fingerprint: bytes) -> RingWeights:
        """Raises HandshakeRefused where they are not those that the other side has."""
        weights = await self.of(bits)
        if not isinstance(weights, RingWeights) or weights.fingerprint != fingerprint:
            raise HandshakeRefused("the sides made different integer weights: both need the same model files")
        return weights

    async def _make(self, kind: Kind) -> Weights | RingWeights:
        async with self.making:
            if isinstance(kind, int):
                return await asyncio.to_thread(RingWeights, self._checkpoint, kind, self._device)
            return await asyncio.to_thread(Weights, self._checkpoint, kind, self._device)
