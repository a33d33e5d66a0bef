"""Runs that never happened, in whole seconds, and what can be told about them by trying everything."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st

from asynctsqp.reports.records import Records, RpcRecord, Span

OFFSETS = range(-200, 201)  # all that strategies below can lead to

CALL = {
    "method": "QKV",
    "layer": 0,
    "lane": 0,
    "slot": 0,
    "transport": "shm",
    "bytes_sent": 0,
    "bytes_received": 0,
    "start_at": 0.0,
    "encode_s": 0.0,
    "send_s": 0.0,
    "wait_s": 0.0,
    "receive_s": 0.0,
    "decode_s": 0.0,
    "gpu_start_at": 0.0,
    "gpu_s": 0.0,
}


def call(**fields: Any) -> RpcRecord:
    return RpcRecord(**{**CALL, **fields})


def records(calls: list[RpcRecord], spans: list[Span]) -> Records:
    made = Records()
    made.rpcs += calls
    made.spans += spans
    return made


short = st.integers(0, 6).map(float)
calls = st.builds(
    call,
    method=st.sampled_from(["QKV", "O", "DOWN"]),
    layer=st.integers(0, 2),
    lane=st.integers(0, 2),
    transport=st.sampled_from(["shm", "doorbell", "binary"]),
    bytes_sent=st.integers(0, 1 << 20),
    start_at=st.integers(0, 40).map(float),
    encode_s=short,
    send_s=short,
    wait_s=short,
    receive_s=short,
    decode_s=short,
    gpu_start_at=st.integers(-50, 50).map(float),
    gpu_s=short,
)
finite = st.floats(allow_nan=False, allow_infinity=False)
lies = st.builds(
    lambda honest, start, seconds: call(**{**fields(honest), "gpu_start_at": start, "gpu_s": abs(seconds)}),
    calls,
    finite,
    finite,
)
spans = st.builds(
    lambda name, lane, start, seconds: Span(name, lane, float(start), float(start + seconds)),
    st.sampled_from(["RMSNORM", "ROTARY", "ATTENTION", "SILU"]),
    st.integers(0, 2),
    st.integers(0, 50),
    st.integers(0, 6),
)


def fields(record: RpcRecord) -> dict[str, Any]:
    return {name: getattr(record, name) for name in CALL}


def window(record: RpcRecord) -> tuple[float, float]:
    """Between these the GPU side can have computed: from the send's begin to the answer's reading."""
    sent = record.start_at + record.encode_s
    return sent, sent + record.send_s + record.wait_s


def possible_offsets(record: RpcRecord) -> set[int]:
    """Every whole offset that puts the computation into its call."""
    sent, read = window(record)
    seconds = record.gpu_s if record.gpu_s <= read - sent else 0
    start = record.gpu_start_at
    return {offset for offset in OFFSETS if sent <= start + offset and start + offset + seconds <= read}


def offset_by_trying(records: list[RpcRecord]) -> tuple[float, float]:
    """(offset, error) of records in whole seconds."""
    possible = [possible_offsets(record) for record in records]
    common = set.intersection(*possible) or min(possible, key=len)
    return (min(common) + max(common)) / 2, (max(common) - min(common)) / 2


def computed_by_trying(record: RpcRecord, offset: float) -> tuple[float, float]:
    """(begin, end): of all half seconds at which the computation fits into its call, the nearest to the claim."""
    sent, read = window(record)
    seconds = min(record.gpu_s, read - sent)
    places = [sent + k / 2 for k in range(math.floor(2 * (read - seconds - sent)) + 1)]
    begin = min(places, key=lambda place: abs(place - record.gpu_start_at - offset))
    return begin, begin + seconds
