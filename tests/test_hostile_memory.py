"""A host that rewrites what both sides share while it is read: the answer is the true one, or there is an error."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq

import asynctsqp
from asynctsqp.doorbell import ENTRIES, MAX_MESSAGE_BYTES, RING_BYTES, WORD_BYTES, Ring
from asynctsqp.errors import AsynctsqpError, ProtocolError
from asynctsqp.rpc import Connection
from asynctsqp.shm import HEADER_BYTES, NONCE_AREA_BYTES, Region
from tests.conftest import ROOT, GpuProcess
from tests.processes import shared_memory_names

PROMPT = [1, 100, 200, 300, 400]
TOKENS = 12
RUNS, MOST_RUNS = 5, 40
MOST_GROWTH = 256 << 20
SETTINGS: dict[str, Any] = {"protect": "full", "kv_memory": "16M", "mask_memory": "16M", "threads": 1, "lanes": 1}


def answer(model: Path, endpoint: str, **options: Any) -> tuple[int, ...]:
    async def run() -> tuple[int, ...]:
        async with asynctsqp.Engine.connect(model, endpoint, **(SETTINGS | options)) as engine:
            done = await engine.complete(PROMPT, max_new_tokens=TOKENS, temperature=0, ignore_eos=True)
            return tuple(done.token_ids)

    return asyncio.run(asyncio.wait_for(run(), 20))


def hurry(patch: pytest.MonkeyPatch) -> None:
    """Calls wait for a second: an answer that was damaged on its way never comes."""
    call = Connection.call

    def quick(self: Connection, call_id: int, message: Any, frames: Any = (), **named: Any) -> Any:
        return call(self, call_id, message, frames, **({"deadline_s": 1.0} | named))

    patch.setattr(Connection, "call", quick)


def outcomes(
    runs: int, run: Callable[[], tuple[int, ...]], most: int | None = None
) -> tuple[set[tuple[int, ...]], list[AsynctsqpError]]:
    """What so many runs gave, and more of them until one has failed: answers, and errors of our own kinds."""
    answers: set[tuple[int, ...]] = set()
    errors: list[AsynctsqpError] = []
    for number in range(most or runs):
        if number >= runs and errors:
            break
        try:
            answers.add(run())
        except AsynctsqpError as error:
            errors.append(error)
    assert all(str(error).isprintable() for error in errors)
    return answers, errors


ANSWERS = NONCE_AREA_BYTES + RING_BYTES
PAUSES = {"rings": 0.05, "words": 0.05, "slots": 0.01, "everything": 0.01, "nothing": 1.0}  # seconds: some calls pass


def parts(region: Region, where: str) -> list[tuple[int, int]]:
    """What is rewritten: the first bytes of every slot, both rings, or the words at the head of one."""
    areas = range(HEADER_BYTES, HEADER_BYTES + 2 * region.lanes * region.slots * region.slot_bytes, region.slot_bytes)
    slots = [(start, start + 2048) for start in areas]
    rings = [(NONCE_AREA_BYTES, ANSWERS + RING_BYTES)]
    words = [(ANSWERS, ANSWERS + 16)]
    return {"rings": rings, "words": words, "slots": slots, "everything": rings + slots, "nothing": []}[where]


class Flipping:
    """Starts a flipper on every region as soon as it is made, before anybody else has it."""

    def __init__(self, where: str, seed: int) -> None:
        self.where, self.seed = where, seed
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, region: Region) -> None:
        self.seed += 1
        words = [f"{start}:{end}" for start, end in parts(region, self.where)]
        command = [sys.executable, "-m", "tests.flipper", region.name, str(self.seed), str(PAUSES[self.where]), *words]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
        self.processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"flipping\n"

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture
def flip(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Flipping]]:
    started: list[Flipping] = []
    create = Region.create

    def flip(where: str) -> Flipping:
        seed = random.SystemRandom().getrandbits(32)
        print(f"seed {seed}")
        started.append(Flipping(where, seed))
        return started[-1]

    def make(*arguments: Any) -> Region:
        region = create(*arguments)
        started[-1].start(region)
        return region

    monkeypatch.setattr(Region, "create", make)
    yield flip
    for flipping in started:
        flipping.stop()


@pytest.mark.parametrize(("where", "doorbell"), [("slots", "on"), ("everything", "off"), ("everything", "on")])
def test_shared_memory_that_changes_all_the_time(
    where: str, doorbell: str, flip: Callable[[str], Flipping], tiny_model: Callable[[str], Path], tiny_gpu: GpuProcess
) -> None:
    model = tiny_model("gqa")
    truth = answer(model, tiny_gpu.endpoint, transport="binary")
    before = psutil.Process().memory_info().rss
    flip(where)
    answers, errors = outcomes(
        RUNS, lambda: answer(model, tiny_gpu.endpoint, transport="shm", doorbell=doorbell), MOST_RUNS
    )
    print(f"{len(answers)} kinds of answers, errors: {[type(error).__name__ for error in errors]}")
    assert answers <= {truth}
    assert errors, "the flipper has changed nothing that mattered"
    assert psutil.Process().memory_info().rss - before < MOST_GROWTH
    assert not shared_memory_names()


@pytest.mark.parametrize("where", ["words", "rings"])
def test_rings_that_change_all_the_time(
    where: str, flip: Callable[[str], Flipping], tiny_model: Callable[[str], Path], tiny_gpu: GpuProcess
) -> None:
    """A damaged ring may also silence the GPU side: then the call's deadline ends it, which is another test's."""
    model = tiny_model("gqa")
    truth = answer(model, tiny_gpu.endpoint, transport="binary")
    flip(where)
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        answers, _ = outcomes(RUNS, lambda: answer(model, tiny_gpu.endpoint, transport="shm", doorbell="on"))
    assert answers <= {truth}
    assert not shared_memory_names()


def test_a_flipper_that_flips_nothing_disturbs_nobody(
    flip: Callable[[str], Flipping], tiny_model: Callable[[str], Path], tiny_gpu: GpuProcess
) -> None:
    model = tiny_model("gqa")
    truth = answer(model, tiny_gpu.endpoint, transport="binary")
    flip("nothing")
    answers, errors = outcomes(2, lambda: answer(model, tiny_gpu.endpoint, transport="shm"))
    assert answers == {truth}
    assert not errors


@contextmanager
def relay(endpoint: str, change: Callable[[list[bytes]], list[bytes]]) -> Iterator[str]:
    """A host between the sides, which changes what comes from the GPU side."""
    context = zmq.Context()
    front, back = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    for socket in (front, back):
        socket.setsockopt(zmq.LINGER, 0)
    port = front.bind_to_random_port("tcp://127.0.0.1")
    back.connect(endpoint)
    ended = threading.Event()

    def run() -> None:
        identity = b""
        poller = zmq.Poller()
        for socket in (front, back):
            poller.register(socket, zmq.POLLIN)
        while not ended.is_set():
            ready = dict(poller.poll(50))
            if front in ready:
                identity, *frames = front.recv_multipart()
                back.send_multipart(frames)
            if back in ready:
                front.send_multipart([identity, *change(back.recv_multipart())])

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield f"tcp://127.0.0.1:{port}"
    finally:
        ended.set()
        thread.join()
        front.close()
        back.close()
        context.term()


@pytest.mark.parametrize("transport", ["binary", "msgpack"])
def test_messages_that_are_changed_on_their_way(
    transport: str, tiny_model: Callable[[str], Path], tiny_gpu: GpuProcess
) -> None:
    model = tiny_model("gqa")
    truth = answer(model, tiny_gpu.endpoint, transport=transport)
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    generator = random.Random(seed)

    def change(frames: list[bytes]) -> list[bytes]:
        if generator.random() < 0.97 or len(frames[-1]) < 8:
            return frames
        damaged = bytearray(frames[-1])
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        return [*frames[:-1], bytes(damaged)]

    def run() -> tuple[int, ...]:
        with relay(tiny_gpu.endpoint, change) as endpoint, pytest.MonkeyPatch.context() as patch:
            hurry(patch)
            return answer(model, endpoint, transport=transport)

    answers, errors = outcomes(RUNS, run, MOST_RUNS)
    assert answers <= {truth}
    assert errors
    with relay(tiny_gpu.endpoint, lambda frames: frames) as endpoint:  # the relay itself is no obstacle
        assert answer(model, endpoint, transport=transport) == truth


class Flickering:
    """An entry of a ring that says something else each time it is read."""

    def __init__(self, *contents: bytes) -> None:
        self.contents, self.reads = contents, 0

    def __bytes__(self) -> bytes:
        self.reads += 1
        return self.contents[min(self.reads, len(self.contents)) - 1]


def entry(message: bytes, length: int | None = None) -> bytes:
    size = len(message) if length is None else length
    return size.to_bytes(WORD_BYTES, "little") + message.ljust(MAX_MESSAGE_BYTES, b"\0")


def test_an_entry_is_read_once() -> None:
    """Between the check of its length and the use of its message nothing can change."""
    ring = Ring(memoryview(bytearray(RING_BYTES)))
    ring._words[0] = 2
    first = Flickering(entry(b"true"), entry(b"a lie that is longer"), entry(b"", 2**63))
    second = Flickering(entry(b"", MAX_MESSAGE_BYTES + 1), entry(b"fine"))
    ring._entries[:2] = [first, second]  # type: ignore[list-item]
    assert ring.pop() == b"true"
    with pytest.raises(ProtocolError):
        ring.pop()
    assert (first.reads, second.reads) == (1, 1)


def test_the_count_is_read_once() -> None:
    class Words:
        reads = 0

        def __getitem__(self, _: int) -> int:
            self.reads += 1
            return 1 if self.reads == 1 else ENTRIES + 7

    ring = Ring(memoryview(bytearray(RING_BYTES)))
    words = ring._words = Words()  # type: ignore[assignment]
    ring._entries[0] = Flickering(entry(b"one"))  # type: ignore[call-overload]
    assert ring.pop() == b"one"
    assert words.reads == 1


def test_the_nonce_is_compared_with_the_one_that_was_made() -> None:
    """And not with what the region holds by then."""
    region = Region.create(None, 1, 2, 4096)
    region.unlink()
    made = region.nonce
    region.memory[:32] = bytes(32)
    assert region.nonce == made != bytes(32)
    region.close()
