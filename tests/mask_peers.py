"""Mask peers of the tests' own: one in a thread that tells what it was asked for and may lie, a wire that listens."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import zmq
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.integer_weights import matrices, read
from asynctsqp.messages import Done, MaskCall, MaskHello, Welcome, decode_to_gpu, encode
from asynctsqp.model_spec import Op
from asynctsqp.ring import Ring, RingWeight

CPU = torch.device("cpu")
Products = np.ndarray
Lie = Callable[[MaskCall, Products, "MaskPeerThread"], Products | None]  # None: no answer


def words_of(key: bytes, address: int, rows: int, width: int) -> np.ndarray:
    """r by AES-256-CTR as the cryptography library has it: a row begins with a block of its own."""
    padded = -(-width // 4) * 4
    encryptor = Cipher(algorithms.AES256(key), modes.CTR(address.to_bytes(16, "big"))).encryptor()
    words = np.frombuffer(encryptor.update(bytes(4 * rows * padded)), dtype=np.int32)
    return words.reshape(rows, padded)[:, :width].copy()


class TrueProducts:
    """u of one model."""

    def __init__(self, model: Path, bits: int = 8) -> None:
        checkpoint = Checkpoint(model)
        self.spec = checkpoint.spec
        self._weights = {
            matrix: RingWeight(read(checkpoint, matrix, bits, CPU).digits, CPU) for matrix in matrices(self.spec)
        }
        self._ring = Ring(CPU, [(weight.rows, weight.width) for weight in self._weights.values()])

    def of(self, key: bytes, call: MaskCall) -> np.ndarray:
        return self.of_words(
            Op(call.op),
            call.layer,
            words_of(key, call.address, call.rows, self.spec.linears[Op(call.op)].in_features),
        )

    def of_words(self, op: Op, layer: int, words: np.ndarray) -> np.ndarray:
        weight = self._weights[op, layer]
        out = torch.empty(len(words), weight.rows, dtype=torch.int32)
        return self._ring.product(torch.from_numpy(words), weight, out).numpy()


class Introduced:
    """A mask peer, as who uses it is told of it."""

    endpoint: str
    key: str

    @property
    def options(self) -> dict[str, str]:
        """Of an engine."""
        return {"mask_peer": self.endpoint, "mask_peer_key": self.key}

    @property
    def flags(self) -> tuple[str, ...]:
        """Of the command."""
        return ("--mask-peer", self.endpoint, "--mask-peer-key", self.key)


@dataclass
class MaskPeerThread(Introduced):
    """Answers by `products`, or by what `lie` makes of the answer.

    asked: the session's key and the request, of every request; greetings: all keys.
    """

    products: TrueProducts
    lie: Lie | None = None
    asked: list[tuple[bytes, MaskCall]] = field(default_factory=list)
    greetings: list[bytes] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        public, secret = zmq.curve_keypair()
        while public.startswith(b"-"):
            public, secret = zmq.curve_keypair()
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.CURVE_SERVER, 1)
        self._socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
        self.key = public.decode()
        self.endpoint = f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"
        self._keys: dict[bytes, bytes] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                if self._socket.poll(20):
                    identity, message = self._socket.recv_multipart()
                    for frames in self._answer(identity, decode_to_gpu(message)):
                        self._socket.send_multipart([identity, *frames])
        except BaseException as error:
            self.errors.append(error)

    def _answer(self, identity: bytes, message: Any) -> Iterator[list[bytes]]:
        if isinstance(message, MaskHello):
            self._keys[identity] = message.key
            self.greetings.append(message.key)
            yield [encode(Welcome(message.call_id, "cpu"))]
            return
        key = self._keys[identity]
        self.asked.append((key, message))
        told: np.ndarray | None = self.products.of(key, message)
        if self.lie is not None and told is not None:
            told = self.lie(message, told, self)
        if told is not None:
            yield [encode(Done(message.call_id, 0.0, 0.0)), told.tobytes()]

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._socket.close()
        self._context.term()
        assert not self.errors


@contextlib.contextmanager
def mask_peer_thread(products: TrueProducts, lie: Lie | None = None) -> Iterator[MaskPeerThread]:
    peer = MaskPeerThread(products, lie)
    try:
        yield peer
    finally:
        peer.close()


class RawMaskClient:
    """A DEALER that speaks CURVE and may send anything."""

    def __init__(self, endpoint: str, server_key: str | None, most_unread: int = 1000) -> None:
        """most_unread: messages that come in before anybody asks for them."""
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.RCVHWM, most_unread)
        self._socket.setsockopt(zmq.LINGER, 0)
        if server_key is not None:
            public, secret = zmq.curve_keypair()
            self._socket.setsockopt(zmq.CURVE_SERVERKEY, server_key.encode())
            self._socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
        self._socket.connect(endpoint)

    def ask(self, *frames: bytes | msgspec.Struct, timeout_ms: int = 10_000) -> list[bytes] | None:
        """The next answer that says something, or None."""
        self.send(*frames)
        return self.answer(timeout_ms)

    def send(self, *frames: bytes | msgspec.Struct) -> None:
        self._socket.send_multipart([frame if isinstance(frame, bytes) else encode(frame) for frame in frames])

    def answer(self, timeout_ms: int = 10_000) -> list[bytes] | None:
        """The next one that says something, or None."""
        while self._socket.poll(timeout_ms):
            answer = self._socket.recv_multipart()
            if msgspec.msgpack.decode(answer[0])[0] != 15:  # Alive
                return answer
        return None

    def close(self) -> None:
        self._socket.close()
        self._context.term()


@contextlib.contextmanager
def raw_mask_client(endpoint: str, server_key: str | None, most_unread: int = 1000) -> Iterator[RawMaskClient]:
    client = RawMaskClient(endpoint, server_key, most_unread)
    try:
        yield client
    finally:
        client.close()


@dataclass
class Wire:
    """A TCP relay to an endpoint: keeps all bytes of both directions."""

    target: str

    def __post_init__(self) -> None:
        host, port = self.target.removeprefix("tcp://").rsplit(":", 1)
        self._address = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._seen: list[bytes] = []
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def seen(self) -> bytes:
        return b"".join(self._seen)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                inner, _ = self._listener.accept()
                outer = socket.create_connection(self._address)
                self._sockets += [inner, outer]
                for one, other in ((inner, outer), (outer, inner)):
                    self._threads.append(threading.Thread(target=self._pass_on, args=(one, other)))
                    self._threads[-1].start()

    def _pass_on(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 16):
                self._seen.append(data)
                other.sendall(data)
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """The connections of now; new ones may be made."""
        for end in [*self._sockets]:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join()
        for end in self._sockets:
            end.close()
