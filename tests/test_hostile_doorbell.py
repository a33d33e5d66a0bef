"""Either side's rings written by the other at will: one error, or one client forgotten, and nobody else harmed."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

import asynctsqp
from asynctsqp.doorbell import ENTRIES, Ring
from asynctsqp.limits import SLOTS
from asynctsqp.messages import Attach, Attached, Call, Done, Hello, Wake, Welcome, encode
from asynctsqp.shm import Region
from tests.clients import ATTACHED, DONE, HIDDEN, PAGE, REFUSED, WELCOME, GoodTee, call
from tests.conftest import GpuProcess
from tests.peers import RawTee, lying_gpu, raw_tee
from tests.processes import ROOT, shared_memory_names, wait_until

Damage = Callable[[memoryview], None]


def head(value: int) -> Damage:
    """The ring's count of messages, set to anything."""

    def damage(ring: memoryview) -> None:
        ring[:8] = value.to_bytes(8, "little")

    return damage


def message(*contents: bytes) -> Damage:
    def damage(ring: memoryview) -> None:
        producer = Ring(ring)
        for content in contents:
            producer.push(content)

    return damage


def entry_length(length: int) -> Damage:
    def damage(ring: memoryview) -> None:
        ring[128:136] = length.to_bytes(8, "little")
        head(1)(ring)

    return damage


DAMAGE: dict[str, Damage] = {
    "more messages than entries": head(ENTRIES + 1),
    "the most messages of all": head(2**64 - 1),
    "an entry longer than an entry": entry_length(255),
    "the longest entry of all": entry_length(2**64 - 1),
    "an empty message": message(b""),
    "garbage": message(b"\xc1\xff"),
    "text that is no text": message(b"\x94\x0e\x01\xa1\xff\xc2"),
    "an unknown kind of message": message(msgspec.msgpack.encode([99, 1])),
    "a message that has no place here": message(encode(Hello(1, 1, b"", "float32", "shielded", "none"))),
    "a call with its tensors inside": message(encode(replace(call(7), tensors=b"x"))),
    "a handshake's answer": message(encode(Welcome(1, "cpu"))),
    "an answer that nobody asked for": message(encode(Done(2**40, 0.0, 0.0))),
    "a wake": message(encode(Wake())),
    "being alive": message(msgspec.msgpack.encode([15])),
    "being alive again and again": message(*[msgspec.msgpack.encode([15])] * ENTRIES),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_gpu_side_that_breaks_its_ring(name: str, tiny_model: Callable[[str], Path]) -> None:
    regions: list[Region] = []

    def attached(request: Attach) -> list[list[Attached]]:
        region = Region.attach(request.name, request.lanes, request.slots, request.slot_bytes)
        regions.append(region)
        assert request.doorbell
        ring = region.answer_ring()
        DAMAGE[name](ring)
        ring.release()
        return [[Attached(request.call_id, region.nonce)]]

    async def run(endpoint: str) -> None:
        async with asynctsqp.Engine.connect(tiny_model("gqa"), endpoint, transport="shm") as engine:
            with pytest.raises(asynctsqp.GpuSideError) as caught:
                await asyncio.wait_for(engine.complete([1, 2, 3], max_new_tokens=1), 10)
            assert str(caught.value).isprintable()

    with lying_gpu({Attach: attached, Call: lambda _: []}) as gpu:
        asyncio.run(run(gpu.endpoint))
    for region in regions:
        region.close()
    assert not shared_memory_names()


class RingTee:
    """A client of a real GPU side that writes into its call ring whatever it likes."""

    def __init__(self, peer: RawTee, model: Path) -> None:
        assert peer.greet(model)[0] == WELCOME
        self.peer = peer
        self.region = Region.create(None, 1, SLOTS, PAGE)
        try:
            assert peer.ask(Attach(1, self.region.name, 1, SLOTS, PAGE, doorbell=True))[0][0] == ATTACHED
        finally:
            self.region.unlink()
        self.calls, self.answers = Ring(self.region.call_ring()), Ring(self.region.answer_ring())

    def push(self, call_id: int) -> None:
        if self.calls.push(encode(call(call_id))):
            self.peer.send(Wake())

    def close(self) -> None:
        self.calls.close()
        self.answers.close()
        self.region.close()


@contextmanager
def ring_tee(gpu: GpuProcess, model: Path) -> Iterator[RingTee]:
    with raw_tee(gpu.endpoint) as peer:
        tee = RingTee(peer, model)
        try:
            yield tee
        finally:
            tee.close()


@pytest.mark.parametrize("name", DAMAGE)
def test_a_tee_side_that_breaks_its_ring_is_forgotten(
    name: str, tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]
) -> None:
    model = tiny_model("gqa")
    with raw_tee(tiny_gpu.endpoint) as peer, ring_tee(tiny_gpu, model) as tee:
        good = GoodTee(peer, model)
        good.check()
        ring = tee.region.call_ring()
        DAMAGE[name](ring)
        ring.release()
        tee.peer.send(Wake())
        forgotten = lambda: tee.peer.ask(call(7), bytes(4 * HIDDEN))[0][0] == REFUSED  # noqa: E731
        assert wait_until(forgotten)
        good.check()


FLOOD = """
import sys
from pathlib import Path
from tests.peers import raw_tee
from tests.test_hostile_doorbell import RingTee

with raw_tee(sys.argv[1]) as peer:
    tee = RingTee(peer, Path(sys.argv[2]))
    asked = answered = 0
    while True:
        while asked - answered < 100:
            asked += 1
            tee.push(asked)
        while tee.answers.pop() is not None:
            answered += 1
            if answered == 1000:
                print("flooding", flush=True)
"""


def test_calls_without_end_through_a_ring_do_not_silence_the_others(
    tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]
) -> None:
    """The ring of one client is never empty, as that of many busy lanes may be."""
    model = tiny_model("gqa")
    command = [sys.executable, "-c", FLOOD, tiny_gpu.endpoint, str(model)]
    with (
        raw_tee(tiny_gpu.endpoint) as peer,
        subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as flooding,
    ):
        try:
            good = GoodTee(peer, model)
            assert flooding.stdout is not None
            assert flooding.stdout.readline() == b"flooding\n"
            for _ in range(20):
                good.check()
            assert flooding.poll() is None
        finally:
            flooding.kill()


def test_a_call_through_the_ring_is_answered_there(tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]) -> None:
    """That the tests above refuse what is bad, and not everything."""
    with ring_tee(tiny_gpu, tiny_model("gqa")) as tee:
        tee.push(77)
        answers: list[bytes] = []
        assert wait_until(lambda: (answer := tee.answers.pop()) is not None and not answers.append(answer))
        assert msgspec.msgpack.decode(answers[0])[:2] == [DONE, 77]
