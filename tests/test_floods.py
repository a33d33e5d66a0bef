"""Clients that flood a GPU side with calls and read no answer: they lose their own place, and nobody else does."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.messages import PROTOCOL_VERSION, Hello, encode
from asynctsqp.model_spec import Op
from gpu_side.client import MOST_UNREAD_BYTES
from tests.clients import DONE, HIDDEN, VOCABULARY, WELCOME, GoodTee, call
from tests.conftest import GpuProcess
from tests.peers import raw_tee
from tests.processes import open_files, until_idle, wait_until

PORTIONS, CALLS, CLIENTS = 10, 500, 3

# What a flood may add to what the GPU side holds, when all of its 15,000 calls have been worked off: four bytes a call
# (libzmq keeps a spare piece of each queue, 16 KiB), a block of Python's for thirty.
MOST_BYTES, MOST_BLOCKS = 64 << 10, 500

# Plain ZeroMQ. libzmq aborts where a heartbeat ends while a receive queue is full, so these have a short life.
FLOOD = """
import sys, zmq
endpoint, count, *frames = sys.argv[1:]
hello, message, tensor = map(bytes.fromhex, frames)
socket = zmq.Context().socket(zmq.DEALER)
for option, value in {zmq.LINGER: -1, zmq.SNDHWM: 0, zmq.RCVHWM: 10, zmq.HEARTBEAT_IVL: 100,
                      zmq.HEARTBEAT_TTL: 300, zmq.HEARTBEAT_TIMEOUT: 60_000}.items():
    socket.setsockopt(option, value)
socket.connect(endpoint)
socket.send(hello)
socket.recv()
print("greeted", flush=True)
for _ in sys.stdin:
    for _ in range(int(count)):
        socket.send_multipart([message, tensor], copy=False)
    print("sent", flush=True)
"""


class TellingGpu(GpuProcess):
    """tests/telling_gpu.py."""

    module = "tests.telling_gpu"

    def held(self) -> tuple[int, int]:
        """Bytes of malloc's, blocks of Python's."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("tell\n")
        self.process.stdin.flush()
        given_out, blocks = json.loads(self.process.stdout.readline())
        return given_out, blocks

    def held_at_rest(self) -> tuple[int, int]:
        """When all that has come in is worked off: until then messages wait, and the bytes become fewer."""
        now = self.held()
        while True:
            time.sleep(0.3)
            before, now = now, self.held()
            if now[0] >= before[0]:
                return now


@contextlib.contextmanager
def telling_gpu(model: Path) -> Iterator[TellingGpu]:
    gpu = TellingGpu(model, "--bind", "tcp://127.0.0.1:0")
    try:
        yield gpu
    finally:
        gpu.stop()


@contextlib.contextmanager
def floods(endpoint: str, model: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Each has greeted as it should, and sends CALLS good calls, of which it wants no answer, for each line it gets."""
    hello = Hello(0, PROTOCOL_VERSION, Checkpoint(model).fingerprint(), "float32", "shielded", "none")
    frames = [frame.hex() for frame in (encode(hello), encode(call()), bytes(4 * HIDDEN))]
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", FLOOD, endpoint, str(CALLS), *frames]
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, bufsize=0) for _ in range(CLIENTS)]
    try:
        assert all(said(process) == b"greeted\n" for process in processes)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def tell(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.write(b"more\n")


def said(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return process.stdout.readline()


def flood(gpu: TellingGpu, good: GoodTee, model: Path) -> tuple[int, int]:
    """What the GPU side holds after one in which an honest client was answered all the time."""
    files = open_files(gpu.process.pid)
    with floods(gpu.endpoint, model) as processes:
        for _ in range(PORTIONS):
            for process in processes:
                tell(process)
            assert all(said(process) == b"sent\n" for process in processes)
            for _ in range(5):  # hundreds of calls of the others are waiting now
                good.check()
    good.check()  # and of those that are gone
    assert wait_until(lambda: open_files(gpu.process.pid) <= files), "connections of clients that are gone"
    held = gpu.held_at_rest()
    good.check()
    return held


def test_who_reads_hardly_any_answer_gets_no_more_of_them_computed(
    good: GoodTee, tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]
) -> None:
    """By the operating system's account of its memory; and once it reads, it gets all that it asked for."""
    rows, calls = 80, 60
    answer_bytes = 4 * rows * VOCABULARY
    pid = tiny_gpu.process.pid
    with raw_tee(tiny_gpu.endpoint, most_unread=1) as peer:
        assert peer.greet(tiny_model("gqa"))[0] == WELCOME
        until_idle(pid)
        before = psutil.Process(pid).memory_info().rss
        for number in range(calls):
            peer.send(call(call_id=number, op=Op.LM_HEAD, layer=0, rows=rows), bytes(4 * rows * HIDDEN))
        answers = []
        until_idle(pid, meanwhile=lambda: answers.append(peer.receive()))
        good.check()
        held = psutil.Process(pid).memory_info().rss - before
        print(f"{calls * answer_bytes >> 20} MiB asked for, {held >> 20} MiB held")
        assert held < MOST_UNREAD_BYTES + 6 * answer_bytes  # one more, those being computed, and what computes them
        answers += [peer.receive() for _ in range(calls - len(answers))]
    assert sorted(fields[1] for fields, _ in answers) == list(range(calls))
    assert {(fields[0], len(tensor)) for fields, (tensor,) in answers} == {(DONE, answer_bytes)}


def test_calls_whose_answers_nobody_reads_silence_nobody_and_leave_nothing(tiny_model: Callable[[str], Path]) -> None:
    """The resident size is not asked for: what the messages of a flood took stays with the allocator, for the next."""
    model = tiny_model("gqa")
    with telling_gpu(model) as gpu, raw_tee(gpu.endpoint) as peer:
        good = GoodTee(peer, model)
        first, second = flood(gpu, good, model), flood(gpu, good, model)
    grown, blocks = second[0] - first[0], second[1] - first[1]
    print(f"grown by {grown} bytes, {blocks} blocks")
    assert grown < MOST_BYTES
    assert blocks < MOST_BLOCKS
