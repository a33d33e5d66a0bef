"""What a forward pass sends and receives, kept: the bytes of the tensors, before any compression.

The link makes its carrier from a name in its module; for the length of a recording that name stands for a carrier
that does what MessageCarrier does and keeps what passes through. The product's code has no place for this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from asynctsqp import Engine
from asynctsqp.layouts import Layout
from asynctsqp.messages import Call, Done
from asynctsqp.model_spec import ModelSpec, Op
from tee_side import link
from tee_side.carriers import Frames, MessageCarrier

LAYERS = 6  # kept, spread over the depth: they stand for all

TO_GPU, FROM_GPU = "to GPU", "from GPU"


@dataclass(frozen=True)
class Payload:
    """One tensor message. weight: how many like it a whole pass has, since only some layers are kept."""

    op: Op
    direction: str
    raw: memoryview
    weight: float


class Recording:
    """The payloads of some operations."""

    def __init__(self, spec: ModelSpec, ops: frozenset[Op]) -> None:
        self._spec = spec
        self._ops = ops
        self.payloads: list[Payload] = []

    def note(self, call: Call, direction: str, raw: memoryview | bytes) -> None:
        op = Op(call.op)
        kept = _kept(self._spec.layers_of(op))
        if op in self._ops and call.layer in kept:
            weight = self._spec.layers_of(op) / len(kept)
            # a copy: what came is ZeroMQ's memory
            self.payloads.append(Payload(op, direction, memoryview(bytes(raw)), weight))


class RecordingCarrier(MessageCarrier):
    """Raw frames, uncompressed; the same bytes as with any other carrier of messages."""

    def __init__(self, recording: Recording, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._recording = recording

    def put(self, call: Call, layout: Layout, inputs: tuple[torch.Tensor, ...]) -> tuple[Call, Frames]:
        message, frames = super().put(call, layout, inputs)
        self._recording.note(call, TO_GPU, frames[0])
        return message, frames

    def take(
        self, call: Call, layout: Layout, answer: Done, frame: memoryview | None, outputs: tuple[torch.Tensor, ...]
    ) -> None:
        super().take(call, layout, answer, frame, outputs)
        if frame is not None:
            self._recording.note(call, FROM_GPU, frame)


async def record(
    model: str, endpoint: str, dtype: str, partition: str, ops: frozenset[Op], tokens: Sequence[int]
) -> Recording:
    """One pass over `tokens` that asks for the scores of all of them."""
    recording = Recording(ModelSpec.read(Path(model) / "config.json"), ops)
    with mock.patch.object(link, "MessageCarrier", partial(RecordingCarrier, recording)):
        async with Engine.connect(model, endpoint, dtype=dtype, partition=partition, transport="binary") as engine:
            await engine.logits(tokens)
    return recording


def _kept(layers: int) -> range:
    return range(0, layers, -(-layers // LAYERS))
