"""What the GPU side keeps for a client, in this process and with no messages around it."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import torch

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.layouts import OPERATIONS, Layouts
from asynctsqp.messages import PROTOCOL_VERSION, Attach, Call, Hello
from asynctsqp.model_spec import Op
from asynctsqp.shm import Region
from gpu_side.client import Client
from gpu_side.executor import Executor, Tensors
from gpu_side.programs import FloatPrograms
from gpu_side.weights import Weights

LANES, SLOTS, SLOT_BYTES = 2, 2, 1 << 20


class Tee:
    """A client of the GPU side's own kind, and the region from the other end."""

    def __init__(self, partition: str, checkpoint: Checkpoint, weights: Weights, executor: Executor) -> None:
        hello = Hello(1, PROTOCOL_VERSION, b"", "float32", partition, "none")
        weights.prepare(partition)
        self.region = Region.create(f"/test-asynctsqp-{secrets.token_hex(4)}", LANES, SLOTS, SLOT_BYTES)
        programs = FloatPrograms(checkpoint.spec, weights)
        self.client = Client(hello, checkpoint.spec, programs, executor, lambda: None, lambda: 0)
        self._layouts = Layouts(checkpoint.spec, torch.float32)

    def attach(self) -> None:
        self.client.attach(Attach(2, self.region.name, LANES, SLOTS, SLOT_BYTES, False))

    async def close(self) -> None:
        self.region.unlink()
        await self.client.close()
        self.region.close()

    async def ask(self, op: Op, layer: int, rows: int, keys: int, lane: int, slot: int) -> tuple[Tensors, Tensors]:
        """Random inputs, and what the client made of them."""
        inputs, outputs = self.region.tensors(lane, slot, self._layouts.of(op, rows, keys))
        for tensor in inputs:
            tensor.random_(0, 100) if op is Op.EMBEDDING else tensor.normal_()
        await self.client.serve(Call(3, op, layer, rows, keys, lane, slot), None)
        return inputs, outputs


def calls(checkpoint: Checkpoint, partition: str) -> Iterator[tuple[Op, int]]:
    for op in sorted(OPERATIONS[partition]):
        yield from ((op, layer) for layer in range(checkpoint.spec.layers_of(op)))
