"""A GPU side among TEE sides of every kind: what one sends never changes what another gets."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import posix_ipc
import pytest
import torch

import asynctsqp
from asynctsqp.checkpoint import Checkpoint
from asynctsqp.messages import PROTOCOL_VERSION, Attach, Call, Hello
from asynctsqp.model_spec import Op
from asynctsqp.shm import HEADER_BYTES
from tests.conftest import GpuProcess
from tests.peers import RawTee, attach, raw_tee, weight_of
from tests.processes import mapped_regions, wait_until

WELCOME, ATTACHED, DONE, REFUSED = 11, 12, 13, 14
HIDDEN, LAYERS = 64, 3  # of the tiny model `gqa`
PAGE = 4096
REGION_BYTES = HEADER_BYTES + 4 * PAGE  # one lane with slots of a page
O_PROJECTION = "model.layers.1.self_attn.o_proj.weight"


def call(call_id: int = 5, op: int = Op.O, layer: int = 1, rows: int = 1, lane: int = 0, slot: int = 0) -> Call:
    return Call(call_id, op, layer, rows, lane, slot)


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


@pytest.fixture
def good(tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]) -> Iterator[GoodTee]:
    """Connected before, during and after whatever the test does."""
    with raw_tee(tiny_gpu.endpoint) as peer:
        tee = GoodTee(peer, tiny_model("gqa"))
        tee.check()
        yield tee
        tee.check(rows=1)
        tee.check(rows=40)


@contextlib.contextmanager
def greeted(gpu: GpuProcess, model: Path) -> Iterator[RawTee]:
    with raw_tee(gpu.endpoint) as peer:
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
    with greeted(tiny_gpu, tiny_model("gqa")) as peer:
        fields, _ = peer.ask(*BROKEN[name])
        assert fields[0] == REFUSED
        assert fields[2].isprintable()
        good.check()
        assert peer.ask(call(rows=1), bytes(4 * HIDDEN))[0][0] == DONE, "its own next request is served"


BAD_CALLS: dict[str, Call] = {
    "no such operation": call(op=5),
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
    with shared_memory(REGION_BYTES) as region, greeted(tiny_gpu, tiny_model("gqa")) as peer:
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
    with greeted(tiny_gpu, tiny_model("gqa")) as peer:
        assert peer.ask(call(rows=1), bytes(size))[0][:2] == [REFUSED, 5]
        good.check()


def test_an_answer_larger_than_a_message_is_refused(
    good: GoodTee, tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]
) -> None:
    rows = 2000  # of 49152 float32 each: 375 MiB
    with greeted(tiny_gpu, tiny_model("gqa")) as peer:
        message = call(op=Op.LM_HEAD, layer=0, rows=rows)
        assert peer.ask(message, bytes(rows * 4 * HIDDEN))[0][:2] == [REFUSED, 5]


def test_calls_before_the_greeting_are_refused(good: GoodTee, tiny_gpu: GpuProcess) -> None:
    with raw_tee(tiny_gpu.endpoint) as peer:
        assert peer.ask(call())[0][:2] == [REFUSED, 5]
        assert peer.ask(call(), bytes(4 * HIDDEN))[0][:2] == [REFUSED, 5]
        assert peer.ask(attach(6, "/nothing", 1, PAGE))[0][:2] == [REFUSED, 6]
        good.check()


def test_a_call_without_region_or_tensor_is_refused(
    good: GoodTee, tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]
) -> None:
    with greeted(tiny_gpu, tiny_model("gqa")) as peer:
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
}


@pytest.mark.parametrize("name", HELLOS)
def test_a_greeting_that_does_not_fit_is_refused(
    name: str, good: GoodTee, tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]
) -> None:
    fitting = Hello(0, PROTOCOL_VERSION, Checkpoint(tiny_model("gqa")).fingerprint(), "float32", "shielded")
    with raw_tee(tiny_gpu.endpoint) as peer:
        fields, _ = peer.ask(msgspec.structs.replace(fitting, **HELLOS[name]))
        assert fields[:2] == [REFUSED, 0]
        assert fields[3] is True, "the asker's configuration is at fault"
        assert fields[2].isprintable()
        assert len(fields[2]) < 1000
        assert peer.ask(call())[0][0] == REFUSED, "it is still not greeted"
        assert peer.ask(fitting)[0][0] == WELCOME, "and may still be"


def test_a_second_greeting_is_refused(good: GoodTee, tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]) -> None:
    with greeted(tiny_gpu, tiny_model("gqa")) as peer:
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
        "no slots": attach(6, region, 1, 0),
        "negative slots": attach(6, region, 1, -PAGE),
        "slots of odd size": attach(6, region, 1, 100),
        "slots beyond 64 bits": attach(6, region, 64, 2**63 - PAGE),
    }


@pytest.mark.parametrize("name", attach_cases(""))
def test_a_region_that_cannot_be_used_is_refused(
    name: str, good: GoodTee, tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]
) -> None:
    with shared_memory(REGION_BYTES) as region, greeted(tiny_gpu, tiny_model("gqa")) as peer:
        fields, _ = peer.ask(attach_cases(region)[name])
        assert fields[:2] == [REFUSED, 6]
        assert fields[2].isprintable()
        good.check()
        assert peer.ask(attach(7, region, 1, PAGE))[0][:2] == [ATTACHED, 7], "a right one is still welcome"


def test_a_second_region_is_refused(good: GoodTee, tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]) -> None:
    with (
        shared_memory(REGION_BYTES) as first,
        shared_memory(REGION_BYTES) as second,
        greeted(tiny_gpu, tiny_model("gqa")) as peer,
    ):
        assert peer.ask(attach(6, first, 1, PAGE))[0][0] == ATTACHED
        assert peer.ask(attach(7, second, 1, PAGE))[0][:2] == [REFUSED, 7]
        assert peer.ask(call())[0][0] == DONE


def test_a_client_that_went_is_forgotten(
    good: GoodTee, tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]
) -> None:
    pid = tiny_gpu.process.pid
    with shared_memory(REGION_BYTES) as region:
        with greeted(tiny_gpu, tiny_model("gqa")) as peer:
            assert peer.ask(attach(6, region, 1, PAGE))[0][0] == ATTACHED
            assert any(region in line for line in Path(f"/proc/{pid}/maps").read_text().splitlines())
        assert wait_until(lambda: region not in Path(f"/proc/{pid}/maps").read_text())
    assert mapped_regions(pid) == 0


def test_more_calls_than_one_may_have_at_once_are_all_answered(
    good: GoodTee, tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]
) -> None:
    with greeted(tiny_gpu, tiny_model("gqa")) as peer:
        for call_id in range(600):
            peer.send(call(call_id=call_id, op=Op.LM_HEAD, layer=0, rows=20), bytes(20 * 4 * HIDDEN))
        good.check()
        answers = [peer.receive()[0] for _ in range(600)]
    assert sorted(fields[1] for fields in answers) == list(range(600))
    assert {fields[0] for fields in answers} <= {DONE, REFUSED}


def test_a_flood_of_garbage_does_not_silence_the_others(good: GoodTee, tiny_gpu: GpuProcess) -> None:
    over = threading.Event()

    def flood() -> None:
        with raw_tee(tiny_gpu.endpoint) as peer:
            for _ in range(400_000):
                peer.send(b"\xc1")
        over.set()

    flooding = threading.Thread(target=flood)
    flooding.start()
    try:
        for _ in range(20):
            good.check()
        assert not over.is_set(), "the flood ended before the others were served"
    finally:
        flooding.join()


def test_two_engines_at_once_answer_as_each_alone(tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]) -> None:
    model = tiny_model("gqa")
    prompts = [[1, *range(100, 140)], [1, *range(900, 1000)]]

    async def answer(prompt: list[int], transport: str) -> list[int]:
        async with asynctsqp.Engine.connect(model, tiny_gpu.endpoint, transport=transport) as engine:
            return (await engine.complete(prompt, max_new_tokens=48, temperature=0, ignore_eos=True)).token_ids

    async def run() -> None:
        alone = [await answer(prompts[0], "shm"), await answer(prompts[1], "binary")]
        assert await asyncio.gather(answer(prompts[0], "shm"), answer(prompts[1], "binary")) == alone
        assert await asyncio.gather(answer(prompts[0], "binary"), answer(prompts[1], "shm")) == alone

    asyncio.run(run())


def test_one_dtype_on_request_and_a_socket_for_its_owner_alone(
    tmp_path: Path, tiny_model: Callable[[str], Path], start_gpu: Callable[..., GpuProcess]
) -> None:
    model, path = tiny_model("gqa"), tmp_path / "gpu.sock"
    gpu = start_gpu(model, "--dtype", "bfloat16", "--bind", f"ipc://{path}")
    assert gpu.endpoint == f"ipc://{path}"
    assert stat.S_ISSOCK(path.stat().st_mode)
    assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
    with raw_tee(gpu.endpoint) as peer:
        refusal = peer.greet(model, "float32")
        assert refusal[0] == REFUSED
        assert "bfloat16" in refusal[2]
        assert "float32" in refusal[2]
        assert peer.greet(model, "bfloat16")[0] == WELCOME
    gpu.stop()
    assert not path.exists()


def test_port_zero_picks_one_and_says_which(tiny_gpu: GpuProcess) -> None:
    host, _, port = tiny_gpu.endpoint.rpartition(":")
    assert host == "tcp://127.0.0.1"
    assert 0 < int(port) < 65536
    assert os.path.exists(f"/proc/{tiny_gpu.process.pid}")
