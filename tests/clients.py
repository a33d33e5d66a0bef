"""Well-behaved clients of a real GPU side, and what their messages are made of."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path

import posix_ipc
import torch

from asynctsqp.messages import Call
from asynctsqp.model_spec import Op
from asynctsqp.shm import HEADER_BYTES
from tests.peers import RawTee, raw_tee, weight_of

WELCOME, ATTACHED, DONE, REFUSED = 11, 12, 13, 14
HIDDEN, LAYERS, VOCABULARY = 64, 3, 49152  # of the tiny model `gqa`
PAGE = 4096
REGION_BYTES = HEADER_BYTES + 4 * PAGE  # one lane with slots of a page
O_PROJECTION = "model.layers.1.self_attn.o_proj.weight"


def call(call_id: int = 5, op: int = Op.O, layer: int = 1, rows: int = 1, lane: int = 0, slot: int = 0) -> Call:
    return Call(call_id, op, layer, rows, 0, lane, slot)


class GoodTee:
    """A well-behaved client that keeps asking for one product and knows the right answer from torch."""

    def __init__(self, peer: RawTee, model: Path) -> None:
        assert peer.greet(model)[0] == WELCOME
        self._peer = peer
        self._weight = weight_of(model, O_PROJECTION)

    def check(self, rows: int = 3) -> None:
        x = torch.randn(rows, HIDDEN)
        fields, tensors = self._peer.ask(call(rows=rows), x.numpy().tobytes())
        assert fields[:2] == [DONE, 5]
        answer = torch.frombuffer(bytearray(tensors[0]), dtype=torch.float32).view(rows, HIDDEN)
        torch.testing.assert_close(answer, x @ self._weight.T, rtol=1e-5, atol=1e-5)


@contextlib.contextmanager
def greeted(endpoint: str, model: Path) -> Iterator[RawTee]:
    with raw_tee(endpoint) as peer:
        assert peer.greet(model)[0] == WELCOME
        yield peer


@contextlib.contextmanager
def shared_memory(size: int) -> Iterator[str]:
    """A region of `size` bytes, by the OS alone."""
    name = f"/test-asynctsqp-{secrets.token_hex(4)}"
    region = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, size=size)
    region.close_fd()
    try:
        yield name
    finally:
        posix_ipc.unlink_shared_memory(name)
