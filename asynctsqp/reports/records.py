"""What is written down about a run when somebody asks: one record for each call, one span for each operation.

All times are seconds. Those that end in `_at` are readings of the TEE side's clock (time.perf_counter), but
for `gpu_start_at`, which the GPU side read from its own; the others are durations.
"""

from __future__ import annotations

from collections import deque

import msgspec

MOST = 1_000_000  # of either kind: a long-lived engine keeps some hundred MiB, and forgets the oldest


class RpcRecord(msgspec.Struct, frozen=True, gc=False):
    """One call, as the TEE side saw it: encode, send, wait, receive and decode follow each other without a gap.

    What is measured over there (`gpu_start_at`, `gpu_s`) is a claim of the GPU side: finite and not negative, and
    nothing more is known about it.
    """

    method: str  # model_spec.Op's name
    layer: int
    lane: int  # on a CUDA device also the stream
    slot: int
    transport: str  # "doorbell" or "shm" (shared memory, the message through it or through ZeroMQ), "binary", "msgpack"
    bytes_sent: int  # of tensors, before compression
    bytes_received: int
    start_at: float
    encode_s: float  # cast, and copy to where it travels from; compression
    send_s: float  # the message encoded and handed over
    wait_s: float  # until the answer's message was read
    receive_s: float  # until who asked runs again with it
    decode_s: float  # decompression, copy and cast into private memory
    gpu_start_at: float
    gpu_s: float

    @property
    def end_at(self) -> float:
        return self.start_at + self.encode_s + self.send_s + self.wait_s + self.receive_s + self.decode_s


class Span(msgspec.Struct, frozen=True, gc=False):
    """One operation of the TEE side. Spans never overlap: one thread does them all, one after another."""

    name: str  # "RMSNORM", "ROTARY", "ATTENTION", "SOFTMAX", "SILU", "EMBEDDING", "RESIDUAL", "SAMPLER", "TEXT", ...
    lane: int
    start_at: float
    end_at: float


class Records:
    """The latest that was written down."""

    def __init__(self) -> None:
        self.rpcs: deque[RpcRecord] = deque(maxlen=MOST)
        self.spans: deque[Span] = deque(maxlen=MOST)
