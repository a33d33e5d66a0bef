"""The control messages between the two sides. Tensors travel beside them, but for one transport.

    TEE side                                   GPU side
    Hello      who I am, what I will ask  -->
                                          <--  Welcome   or  Refused
    Attach     here is a shared region    -->
                                          <--  Attached  (echoes the nonce it read there)  or  Refused
    Call       one operation, one block   -->
                                          <--  Done      or  Refused
                                          <--  Alive     now and then: sending it fails once a TEE side is gone

    TEE side                                   mask peer, on a connection of its own
    MaskHello  who I am, a key            -->
                                          <--  Welcome   or  Refused
    MaskCall   products of masks          -->
                                          <--  Done      or  Refused
                                          <--  Alive

There is no goodbye: the end of the connection says it, also for a side that was killed.
Call, Done and Refused may go through a doorbell in the shared region instead; then a side that sleeps is sent Wake.

`call_id` is chosen by the TEE side and comes back in the answer. A message is the first frame. The tensors of a
call (layouts.py: where each lies) are in shared memory, or are the second frame (transport `binary`), or are
inside the message itself (transport `msgpack`, as the simplest of systems do it).
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from asynctsqp.errors import ProtocolError

PROTOCOL_VERSION = 4
MAX_FRAMES = 2  # a message, and at most one with tensors
NONCE_BYTES = 32
MASK_KEY_BYTES = 32


class Message(msgspec.Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True):
    """Base of all messages: a msgpack array that opens with the tag."""


class Hello(Message, tag=1, frozen=True):
    call_id: int
    version: int
    fingerprint: bytes  # of the checkpoint, see checkpoint.fingerprint()
    dtype: str  # of tensors on the wire and of the products, unless weight_bits says otherwise
    partition: str
    compress: str  # "none", "lz4" or "zstd": of tensors that travel as messages, in both directions
    weight_bits: int = 0  # 8 or 12: tensors and products are integers mod 2^32 instead; 0: they are of `dtype`
    weights: bytes = b""  # integer_weights.fingerprint() of those weights


class Attach(Message, tag=2, frozen=True):
    call_id: int
    name: str
    lanes: int
    slots: int  # of each lane, in each direction
    slot_bytes: int
    doorbell: bool  # calls will come through the region's rings


class Wake(Message, tag=4, frozen=True):
    """Look at the doorbell (doorbell.py). From either side, and not answered: `call_id` is 0."""

    call_id: int = 0


class Call(Message, tag=3, frozen=True):
    call_id: int
    op: int  # model_spec.Op
    layer: int
    rows: int
    keys: int  # 0 but for QK and AV
    lane: int
    slot: int
    tensors: bytes | None = None


class MaskHello(Message, tag=5, frozen=True):
    """Goes through an encrypted connection, to a peer whose key is pinned, and never anywhere else."""

    call_id: int
    version: int
    fingerprint: bytes  # of the checkpoint
    weight_bits: int
    weights: bytes  # integer_weights.fingerprint()
    key: bytes  # of this connection's key stream


class MaskCall(Message, tag=6, frozen=True):
    """r W^T mod 2^32, r: rows of the key stream from an address on, as key_stream.row_blocks lays them."""

    call_id: int
    op: int
    layer: int
    address: int
    rows: int


class Welcome(Message, tag=11, frozen=True):
    call_id: int
    device: str


class Attached(Message, tag=12, frozen=True):
    call_id: int
    nonce: bytes


class Done(Message, tag=13, frozen=True):
    """The two times are claims, used for reports only."""

    call_id: int
    started_at: float  # when the computation began, by the GPU side's own clock
    compute_s: float  # how long it took
    tensors: bytes | None = None


class Refused(Message, tag=14, frozen=True):
    call_id: int
    reason: str
    bad_input: bool  # the asker's configuration is at fault, rather than this one call


class Alive(Message, tag=15, frozen=True):
    pass


ToGpu: TypeAlias = Hello | Attach | Call | Wake | MaskHello | MaskCall
ToTee: TypeAlias = Welcome | Attached | Done | Refused | Alive | Wake

encode = msgspec.msgpack.Encoder().encode
_to_gpu = msgspec.msgpack.Decoder(ToGpu)
_to_tee = msgspec.msgpack.Decoder(ToTee)


def decode_to_gpu(data: bytes | memoryview) -> ToGpu:
    """Raises ProtocolError for anything else than one whole message for the GPU side."""
    try:
        message: ToGpu = _to_gpu.decode(data)
        return message
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not a request: {error}") from None


def decode_to_tee(data: bytes | memoryview) -> ToTee:
    """Raises ProtocolError for anything else than one whole message for the TEE side."""
    try:
        message: ToTee = _to_tee.decode(data)
        return message
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not an answer: {error}") from None
