"""The ways a tensor is moved between two processes, each as the same four steps.

    sender      serialise: a tensor -> what is handed to the transport         send: until that call returns
    receiver    receive: until the message is there                            deserialise: a tensor of its own

A tensor of its own is one whose values the sender cannot change any more. Messages are that as they come, so their
tensors are views of them; shared memory is copied out first.

- msgpack: everything in one message, a map of names, shape and the tensor's bytes, copied in and out of the socket:
  how the predecessor of this project ("the seed") did it.
- frame: the project's header, and the tensor's own memory as a second frame, which pyzmq does not copy.
- shared memory: the project's region and header; the sender copies into a slot, the receiver out of it, into memory
  that it has touched before.
"""

from __future__ import annotations

import secrets
from typing import Any, Protocol

import msgpack
import torch
import zmq

from asynctsqp.layouts import Area, Layout
from asynctsqp.messages import Call, ToGpu, decode_to_gpu, encode
from asynctsqp.shm import Region
from asynctsqp.tensor_codec import bytes_of

COLUMNS = 64  # float32: a row of a tensor is 256 bytes
ROW_BYTES = 4 * COLUMNS
TIMEOUT_MS = 60_000  # for a message, before the other process is taken for lost
NAMES = ("ipc-msgpack", "tcp-msgpack", "ipc-frame", "tcp-frame", "shared-memory")

Frames = list[bytes | memoryview]


class Way(Protocol):
    """One end. Tensors: [rows, COLUMNS] float32."""

    def serialise(self, tensor: torch.Tensor) -> Frames: ...

    def send(self, frames: Frames) -> None: ...

    def receive(self) -> Frames: ...

    def deserialise(self, frames: Frames) -> torch.Tensor: ...


class OneMessage:
    """Everything in one msgpack map."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket

    def serialise(self, tensor: torch.Tensor) -> Frames:
        fields = {"call_id": 1, "op": "linear", "layer": 0, "dtype": "float32", "shape": list(tensor.shape)}
        return [msgpack.packb(fields | {"data": tensor.numpy().tobytes()})]

    def send(self, frames: Frames) -> None:
        self._socket.send(frames[0])

    def receive(self) -> Frames:
        return [self._socket.recv()]

    def deserialise(self, frames: Frames) -> torch.Tensor:
        fields = msgpack.unpackb(frames[0])
        return torch.frombuffer(fields["data"], dtype=torch.float32).view(*fields["shape"])


class RawFrame:
    """A header, and the tensor's memory as it is."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket

    def serialise(self, tensor: torch.Tensor) -> Frames:
        return [_header(tensor), bytes_of(tensor)]

    def send(self, frames: Frames) -> None:
        self._socket.send_multipart(frames, copy=False)

    def receive(self) -> Frames:
        return [frame.buffer for frame in self._socket.recv_multipart(copy=False)]

    def deserialise(self, frames: Frames) -> torch.Tensor:
        return torch.frombuffer(frames[1], dtype=torch.float32).view(_rows(frames[0]), COLUMNS)


class SharedMemory:
    """A header, and the tensor in a slot of the region."""

    def __init__(self, socket: zmq.Socket[bytes], region: Region, parent: bool) -> None:
        self._socket = socket
        self._region = region
        self._parent = parent
        # touched, as the project's own tensors are by then: the first touch of a page takes longer than its copy
        self._place = torch.zeros(region.slot_bytes // ROW_BYTES, COLUMNS)

    def serialise(self, tensor: torch.Tensor) -> Frames:
        requests, replies = self._region.tensors(0, 0, _layout(len(tensor)))
        (requests if self._parent else replies)[0].copy_(tensor)
        return [_header(tensor)]

    def send(self, frames: Frames) -> None:
        self._socket.send(frames[0])

    def receive(self) -> Frames:
        return [self._socket.recv()]

    def deserialise(self, frames: Frames) -> torch.Tensor:
        rows = _rows(frames[0])
        requests, replies = self._region.tensors(0, 0, _layout(rows))
        return self._place[:rows].copy_((replies if self._parent else requests)[0])


class Sockets:
    """One end of an ipc and of a tcp connection. A context manager."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self.ipc = self._socket()
        self.tcp = self._socket()

    def bind(self) -> dict[str, str]:
        """To new addresses, which are returned. The ipc one is abstract (Linux): no file that could be left behind."""
        self.ipc.bind(f"ipc://@asynctsqp-{secrets.token_hex(8)}")
        self.tcp.bind("tcp://127.0.0.1:*")
        return {"ipc": _endpoint(self.ipc), "tcp": _endpoint(self.tcp)}

    def connect(self, ipc: str, tcp: str) -> None:
        self.ipc.connect(ipc)
        self.tcp.connect(tcp)

    def ways(self, region: Region, parent: bool) -> dict[str, Way]:
        """By their NAMES. parent: whether this end made the region."""
        ways: tuple[Way, ...] = (
            OneMessage(self.ipc),
            OneMessage(self.tcp),
            RawFrame(self.ipc),
            RawFrame(self.tcp),
            SharedMemory(self.ipc, region, parent),
        )
        return dict(zip(NAMES, ways, strict=True))

    def close(self) -> None:
        self._context.destroy(linger=0)

    def _socket(self) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(zmq.PAIR)
        socket.setsockopt(zmq.RCVTIMEO, TIMEOUT_MS)
        socket.setsockopt(zmq.SNDTIMEO, TIMEOUT_MS)
        return socket


def _endpoint(socket: zmq.Socket[bytes]) -> str:
    bound: Any = socket.getsockopt(zmq.LAST_ENDPOINT)
    return str(bound.rstrip(b"\0"), "ascii")


def _layout(rows: int) -> Layout:
    """One tensor each way, as a linear has it."""
    area = Area((rows, COLUMNS), torch.float32, 0, 0)
    return Layout((area,), (area,), area.end, area.end, reused=False)


def _header(tensor: torch.Tensor) -> bytes:
    return encode(Call(call_id=1, op=0, layer=0, rows=tensor.shape[0], keys=0, lane=0, slot=0))


def _rows(header: bytes | memoryview) -> int:
    call: ToGpu = decode_to_gpu(header)
    if not isinstance(call, Call):
        raise TypeError(f"not a call: {type(call).__name__}")
    return call.rows
