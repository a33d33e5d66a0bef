"""Requests that no honest TEE side sends: each is refused, and nobody else notices."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zstandard
from msgspec.structs import replace

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.messages import PROTOCOL_VERSION, Attach, Call, Hello
from asynctsqp.model_spec import Op
from tests.clients import (
    ATTACHED,
    DONE,
    HIDDEN,
    LAYERS,
    PAGE,
    REFUSED,
    REGION_BYTES,
    WELCOME,
    GoodTee,
    call,
    greeted,
    shared_memory,
)
from tests.conftest import GpuProcess
from tests.peers import attach, raw_tee

BROKEN: dict[str, list[bytes]] = {
    "garbage": [b"\xc1\xff\x00garbage"],
    "an empty message": [b""],
    "nothing but a tensor": [b"", b"x" * 1000],
    "three frames": [msgspec.msgpack.encode([3, 1, 0, 0, 1, 0, 0]), b"", b""],
    "a hundred frames": [b"x"] * 100,
    "an unknown tag": [msgspec.msgpack.encode([42, 1])],
    "a message of the other direction": [msgspec.msgpack.encode([13, 1, 0.0])],
    "too few fields": [msgspec.msgpack.encode([3, 1])],
    "too many fields": [msgspec.msgpack.encode([3, 1, 0, 0, 1, 0, 0, 0])],
    "text for a number": [msgspec.msgpack.encode([3, 1, "o", 0, 1, 0, 0])],
    "a number beyond 64 bits": [b"\x97\x03\x01\x00\x00" + b"\xcb" + struct.pack(">d", 1e300) + b"\x00\x00"],
    "a name that is no text": [b"\x95\x02\x01\xa2\xff\xfe\x01\xcd\x10\x00"],
    "a deep nest": [b"\x91" * 100_000],
    "an array that claims to be endless": [b"\xdd\xff\xff\xff\xff"],
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_request_is_refused(
    name: str, good: GoodTee, tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]
) -> None:
    with greeted(tiny_gpu.endpoint, tiny_model("gqa")) as peer:
        fields, _ = peer.ask(*BROKEN[name])
        assert fields[0] == REFUSED
        assert fields[2].isprintable()
        good.check()
        assert peer.ask(call(rows=1), bytes(4 * HIDDEN))[0][0] == DONE, "its own next request is served"


BAD_CALLS: dict[str, Call] = {
    "no such operation": call(op=len(Op)),
    "an operation of another partition": call(op=Op.QK),
    "a part of a linear, which is of another partition": call(op=Op.Q),
    "keys where there are none": replace(call(), keys=1),
    "negative keys": replace(call(), keys=-1),
    "a negative operation": call(op=-1),
    "a huge operation": call(op=2**63 - 1),
    "no such layer": call(layer=LAYERS),
    "a negative layer": call(layer=-1),
    "a second lm_head": call(op=Op.LM_HEAD, layer=1),
    "no rows": call(rows=0),
    "negative rows": call(rows=-1),
    "many rows": call(rows=2**20),
    "rows beyond 64 bits when counted in bytes": call(rows=2**62),
    "the most rows that a message can name": call(rows=2**64 - 1),
    "no such lane": call(lane=1),
    "a negative lane": call(lane=-1),
    "a huge lane": call(lane=2**63 - 1),
    "no such slot": call(slot=2),
    "a negative slot": call(slot=-1),
    "a row more than the slot holds": call(rows=PAGE // (4 * HIDDEN) + 1),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_call_that_makes_no_sense_is_refused(
    name: str, good: GoodTee, tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]
) -> None:
    with shared_memory(REGION_BYTES) as region, greeted(tiny_gpu.endpoint, tiny_model("gqa")) as peer:
        assert peer.ask(attach(1, region, 1, PAGE))[0][0] == ATTACHED
        fields, tensors = peer.ask(BAD_CALLS[name])
        assert fields[:2] == [REFUSED, 5]
        assert not tensors
        good.check()
        assert peer.ask(call(rows=PAGE // (4 * HIDDEN)))[0][0] == DONE, "the largest call that fits is served"


@pytest.mark.parametrize("size", [0, 1, 4 * HIDDEN - 1, 4 * HIDDEN + 1, 8 * HIDDEN, 1 << 20])
def test_a_tensor_of_another_size_is_refused(
    size: int, good: GoodTee, tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]
) -> None:
    with greeted(tiny_gpu.endpoint, tiny_model("gqa")) as peer:
        assert peer.ask(call(rows=1), bytes(size))[0][:2] == [REFUSED, 5]
        good.check()


def test_an_answer_larger_than_a_message_is_refused(
    good: GoodTee, tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]
) -> None:
    rows = 2000  # of 49152 float32 each: 375 MiB
    with greeted(tiny_gpu.endpoint, tiny_model("gqa")) as peer:
        message = call(op=Op.LM_HEAD, layer=0, rows=rows)
        assert peer.ask(message, bytes(rows * 4 * HIDDEN))[0][:2] == [REFUSED, 5]


@pytest.mark.parametrize("compress", ["none", "lz4", "zstd"])
@pytest.mark.parametrize("keys", [10**7, 2**40, 2**63 - 1])
def test_a_small_payload_that_claims_to_be_a_large_one_is_refused(
    keys: int, compress: str, good: GoodTee, tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]
) -> None:
    """A block or frame of zeros that would grow to all memory."""
    hello = Hello(0, PROTOCOL_VERSION, Checkpoint(tiny_model("gqa")).fingerprint(), "float32", "batched", compress)
    payload = zstandard.ZstdCompressor().compress(bytes(1 << 20))
    resident = tiny_gpu.resident_bytes()
    with raw_tee(tiny_gpu.endpoint) as peer:
        assert peer.ask(hello)[0][0] == WELCOME
        for op in (Op.QK, Op.AV):
            assert peer.ask(replace(call(op=op), keys=keys), payload)[0][:2] == [REFUSED, 5]
        good.check()
    assert tiny_gpu.resident_bytes() < resident + (64 << 20)


def test_calls_before_the_greeting_are_refused(good: GoodTee, tiny_gpu: GpuProcess) -> None:
    with raw_tee(tiny_gpu.endpoint) as peer:
        assert peer.ask(call())[0][:2] == [REFUSED, 5]
        assert peer.ask(call(), bytes(4 * HIDDEN))[0][:2] == [REFUSED, 5]
        assert peer.ask(attach(6, "/nothing", 1, PAGE))[0][:2] == [REFUSED, 6]
        good.check()


def test_a_call_without_region_or_tensor_is_refused(
    good: GoodTee, tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]
) -> None:
    with greeted(tiny_gpu.endpoint, tiny_model("gqa")) as peer:
        assert peer.ask(call())[0][:2] == [REFUSED, 5]


HELLOS: dict[str, dict[str, Any]] = {
    "another version": {"version": PROTOCOL_VERSION + 1},
    "version 0": {"version": 0},
    "another model": {"fingerprint": bytes(32)},
    "a fingerprint without end": {"fingerprint": b"x" * (1 << 20)},
    "no fingerprint": {"fingerprint": b""},
    "no such dtype": {"dtype": "int8"},
    "a dtype of many lines": {"dtype": "float32\n" * 1000},
    "no such partition": {"partition": "whole"},
    "no such compression": {"compress": "zip"},
    "a compression of many lines": {"compress": "lz4\n" * 1000},
}


@pytest.mark.parametrize("name", HELLOS)
def test_a_greeting_that_does_not_fit_is_refused(
    name: str, good: GoodTee, tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]
) -> None:
    fitting = Hello(0, PROTOCOL_VERSION, Checkpoint(tiny_model("gqa")).fingerprint(), "float32", "shielded", "none")
    with raw_tee(tiny_gpu.endpoint) as peer:
        fields, _ = peer.ask(replace(fitting, **HELLOS[name]))
        assert fields[:2] == [REFUSED, 0]
        assert fields[3] is True, "the asker's configuration is at fault"
        assert fields[2].isprintable()
        assert len(fields[2]) < 1000
        assert peer.ask(call())[0][0] == REFUSED, "it is still not greeted"
        assert peer.ask(fitting)[0][0] == WELCOME, "and may still be"


def test_a_second_greeting_is_refused(good: GoodTee, tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]) -> None:
    with greeted(tiny_gpu.endpoint, tiny_model("gqa")) as peer:
        assert peer.greet(tiny_model("gqa"), "bfloat16")[0] == REFUSED
        assert peer.ask(call(), bytes(4 * HIDDEN))[0][0] == DONE


def attach_cases(region: str) -> dict[str, Attach]:
    return {
        "no such region": attach(6, "/asynctsqp-not-there", 1, PAGE),
        "no name": attach(6, "", 1, PAGE),
        "a path": attach(6, "/../../etc/passwd", 1, PAGE),
        "a name with a zero byte": attach(6, "/a\0b", 1, PAGE),
        "a name without end": attach(6, "/" + "a" * 100_000, 1, PAGE),
        "more lanes than it holds": attach(6, region, 2, PAGE),
        "larger slots than it holds": attach(6, region, 1, 2 * PAGE),
        "no lanes": attach(6, region, 0, PAGE),
        "negative lanes": attach(6, region, -1, PAGE),
        "too many lanes": attach(6, region, 10**6, PAGE),
        "no slots": replace(attach(6, region, 1, PAGE), slots=0),
        "more slots than it holds": replace(attach(6, region, 1, PAGE), slots=3),
        "too many slots": replace(attach(6, region, 1, PAGE), slots=10**6),
        "empty slots": attach(6, region, 1, 0),
        "slots of negative size": attach(6, region, 1, -PAGE),
        "slots of odd size": attach(6, region, 1, 100),
        "slots beyond 64 bits": attach(6, region, 64, 2**63 - PAGE),
    }


@pytest.mark.parametrize("name", attach_cases(""))
def test_a_region_that_cannot_be_used_is_refused(
    name: str, good: GoodTee, tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]
) -> None:
    with shared_memory(REGION_BYTES) as region, greeted(tiny_gpu.endpoint, tiny_model("gqa")) as peer:
        fields, _ = peer.ask(attach_cases(region)[name])
        assert fields[:2] == [REFUSED, 6]
        assert fields[2].isprintable()
        good.check()
        assert peer.ask(attach(7, region, 1, PAGE))[0][:2] == [ATTACHED, 7], "a right one is still welcome"


def test_a_second_region_is_refused(good: GoodTee, tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]) -> None:
    with (
        shared_memory(REGION_BYTES) as first,
        shared_memory(REGION_BYTES) as second,
        greeted(tiny_gpu.endpoint, tiny_model("gqa")) as peer,
    ):
        assert peer.ask(attach(6, first, 1, PAGE))[0][0] == ATTACHED
        assert peer.ask(attach(7, second, 1, PAGE))[0][:2] == [REFUSED, 7]
        assert peer.ask(call())[0][0] == DONE
