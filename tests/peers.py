"""Other ends of the wire, written in plain ZeroMQ: a TEE side that may send anything, a GPU side that lies."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
import zmq
from safetensors import safe_open

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.limits import SLOTS
from asynctsqp.messages import PROTOCOL_VERSION, Attach, Attached, Call, Done, Hello, Welcome, decode_to_gpu, encode
from asynctsqp.shm import Region

TIMEOUT_MS = 10_000
ALIVE = 15  # the tag of the message that says nothing


def attach(call_id: int, name: str, lanes: int, slot_bytes: int) -> Attach:
    """The request to map a region, whose calls come through the socket."""
    return Attach(call_id, name, lanes, SLOTS, slot_bytes, doorbell=False)


class RawTee:
    """A DEALER connected to a GPU side."""

    def __init__(self, endpoint: str, most_unread: int = 1000) -> None:
        """most_unread: messages that come in before anybody asks for them."""
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.RCVHWM, most_unread)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(endpoint)

    def send(self, *frames: bytes | msgspec.Struct) -> None:
        self._socket.send_multipart([frame if isinstance(frame, bytes) else encode(frame) for frame in frames])

    def receive(self, timeout_ms: int = TIMEOUT_MS) -> tuple[list[Any], list[bytes]]:
        """The next answer, decoded without our own messages: ([tag, fields...], tensor frames)."""
        while True:
            assert self._socket.poll(timeout_ms), "no answer came"
            first, *rest = self._socket.recv_multipart()
            fields = msgspec.msgpack.decode(first)
            if fields[0] != ALIVE:
                return fields, rest

    def ask(self, *frames: bytes | msgspec.Struct) -> tuple[list[Any], list[bytes]]:
        self.send(*frames)
        return self.receive()

    def greet(self, model: Path, dtype: str = "float32", partition: str = "shielded") -> list[Any]:
        fingerprint = Checkpoint(model).fingerprint()
        return self.ask(Hello(0, PROTOCOL_VERSION, fingerprint, dtype, partition, "none"))[0]

    def close(self) -> None:
        self._socket.close()
        self._context.term()


@contextmanager
def raw_tee(endpoint: str, most_unread: int = 1000) -> Iterator[RawTee]:
    peer = RawTee(endpoint, most_unread)
    try:
        yield peer
    finally:
        peer.close()


def weight_of(model: Path, name: str) -> torch.Tensor:
    """A weight of a checkpoint, as the safetensors library reads it."""
    with safe_open(model / "model.safetensors", framework="pt") as file:
        return file.get_tensor(name)


def attached(request: Attach) -> Attached:
    """The honest answer: what only somebody who has mapped the region can know."""
    region = Region.attach(request.name, request.lanes, request.slots, request.slot_bytes)
    nonce = region.nonce
    region.close()
    return Attached(request.call_id, nonce)


Answer = Sequence[bytes | msgspec.Struct]
Lie = Callable[[Any], Iterable[Answer]]


class LyingGpu:
    """A ROUTER that greets and attaches rightly, and answers calls, or whatever `lies` names, with a lie.

    lies: a message's class -> what to send for it: any number of answers, each a list of frames. left: whether somebody
    had gone when an answer was to be sent.
    """

    def __init__(self, lies: dict[type, Lie]) -> None:
        self._lies = lies
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.SNDTIMEO, 1000)
        self.endpoint = f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"
        self.left = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            if self._socket.poll(50):
                identity, message, *_ = self._socket.recv_multipart()
                self._send(identity, self._answers(decode_to_gpu(message)))

    def _send(self, identity: bytes, answers: Iterable[Answer]) -> None:
        for answer in answers:
            if self._stop.is_set():
                return
            frames = [frame if isinstance(frame, bytes) else encode(frame) for frame in answer]
            try:
                self._socket.send_multipart([identity, *frames])
            except zmq.ZMQError as error:
                if error.errno == errno.EHOSTUNREACH:
                    self.left.set()
                return

    def _answers(self, message: Any) -> Iterable[Answer]:
        if type(message) in self._lies:
            return self._lies[type(message)](message)
        match message:
            case Hello():
                return [[Welcome(message.call_id, "cpu")]]
            case Attach():
                return [[attached(message)]]
            case Call():
                return [[Done(message.call_id, 0.0, 0.0)]]
        raise AssertionError(f"no such message: {message}")

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._socket.close()
        self._context.term()


@contextmanager
def lying_gpu(lies: dict[type, Lie]) -> Iterator[LyingGpu]:
    peer = LyingGpu(lies)
    try:
        yield peer
    finally:
        peer.close()
