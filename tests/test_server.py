"""A GPU side among TEE sides of every kind: what one does never changes what another gets."""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import zmq.asyncio

import asynctsqp
from asynctsqp.checkpoint import Checkpoint
from asynctsqp.errors import DeviceLost
from asynctsqp.model_spec import Op
from asynctsqp.sockets import server_socket
from gpu_side.cpu import CpuExecutor
from gpu_side.executor import Program, Tensors, Times
from gpu_side.server import Server
from tests.clients import (
    ATTACHED,
    DONE,
    HIDDEN,
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
from tests.processes import mapped_regions, wait_until


def test_a_client_that_went_is_forgotten(
    good: GoodTee, tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]
) -> None:
    pid = tiny_gpu.process.pid
    with shared_memory(REGION_BYTES) as region:
        with greeted(tiny_gpu.endpoint, tiny_model("gqa")) as peer:
            assert peer.ask(attach(6, region, 1, PAGE))[0][0] == ATTACHED
            assert any(region in line for line in Path(f"/proc/{pid}/maps").read_text().splitlines())
        assert wait_until(lambda: region not in Path(f"/proc/{pid}/maps").read_text())
    assert mapped_regions(pid) == 0


def test_more_calls_than_one_may_have_at_once_are_all_answered(
    good: GoodTee, tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]
) -> None:
    with greeted(tiny_gpu.endpoint, tiny_model("gqa")) as peer:
        for call_id in range(600):
            peer.send(call(call_id=call_id, op=Op.LM_HEAD, layer=0, rows=20), bytes(20 * 4 * HIDDEN))
        good.check()
        answers = [peer.receive()[0] for _ in range(600)]
    assert sorted(fields[1] for fields in answers) == list(range(600))
    assert {fields[0] for fields in answers} <= {DONE, REFUSED}


def test_a_flood_of_garbage_does_not_silence_the_others(good: GoodTee, tiny_gpu: GpuProcess) -> None:
    def flood() -> None:
        with raw_tee(tiny_gpu.endpoint) as peer:
            for _ in range(50_000):
                peer.send(b"\xc1")

    flooding = threading.Thread(target=flood)
    flooding.start()
    try:
        for _ in range(20):
            good.check()
    finally:
        flooding.join()


FLOOD = """
import sys, time, zmq
context = zmq.Context()
socket = context.socket(zmq.DEALER)
options = {zmq.LINGER: 0, zmq.SNDHWM: 0, zmq.HEARTBEAT_IVL: 100, zmq.HEARTBEAT_TTL: 300, zmq.HEARTBEAT_TIMEOUT: 60000}
for option, value in options.items():
    socket.setsockopt(option, value)
socket.connect(sys.argv[1])
end = time.monotonic() + 4
while time.monotonic() < end:
    for _ in range(1000):
        socket.send(b"garbage")
"""


def test_floods_faster_than_they_can_be_read_do_not_end_a_gpu_side(
    tiny_model: Callable[[str], Path], start_gpu: Callable[..., GpuProcess]
) -> None:
    """With heartbeats that fall behind the flood: libzmq aborts where a full queue and a heartbeat's end meet."""
    gpu = start_gpu(tiny_model("gqa"))
    with raw_tee(gpu.endpoint) as peer:
        good = GoodTee(peer, tiny_model("gqa"))
        floods = [subprocess.Popen([sys.executable, "-c", FLOOD, gpu.endpoint]) for _ in range(2)]
        while any(flood.poll() is None for flood in floods):
            good.check()
        assert wait_until(lambda: mapped_regions(gpu.process.pid) == 0)
        good.check()
    assert gpu.process.poll() is None


def test_a_load_that_failed_may_be_tried_again(
    tmp_path: Path, tiny_model: Callable[[str], Path], start_gpu: Callable[..., GpuProcess]
) -> None:
    model = Path(shutil.copytree(tiny_model("gqa"), tmp_path / "model"))
    weights, away = model / "model.safetensors", model / "away"
    gpu = start_gpu(model)
    with raw_tee(gpu.endpoint) as peer:
        weights.rename(away)
        assert peer.greet(tiny_model("gqa"))[0] == REFUSED
        away.rename(weights)
        assert peer.greet(tiny_model("gqa"))[0] == WELCOME


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


class Losing(CpuExecutor):
    """A device that fails its second call, and would each after it."""

    calls = 0

    async def run(
        self, program: Program, inputs: Tensors, outputs: Tensors, short: bool, lane: object, repeats: object = None
    ) -> Times:
        self.calls += 1
        if self.calls > 1:
            raise DeviceLost("the device fails every call from here on: an illegal address")
        return await super().run(program, inputs, outputs, short, lane, repeats)


@pytest.mark.parametrize("doorbell", ["on", "off"])
def test_a_device_that_is_lost_ends_the_gpu_side(
    doorbell: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Who has asked hears why; and there is no server that greets and then refuses every call."""
    model, endpoint = tiny_model("gqa"), f"ipc://{tmp_path}/gpu.sock"

    async def run() -> None:
        async def serve() -> None:  # and let go of all at once, as the process does
            with zmq.asyncio.Context() as context, server_socket(context) as socket:
                socket.bind(endpoint)
                bound.set()
                await Server(socket, Checkpoint(model), Losing(1), None).run()

        bound = asyncio.Event()
        serving = asyncio.create_task(serve())
        await bound.wait()
        async with asynctsqp.Engine.connect(model, endpoint, doorbell=doorbell) as engine:
            with pytest.raises(asynctsqp.GpuSideError, match="fails every call"):
                await engine.complete([1, 2, 3], max_new_tokens=2)
            with pytest.raises(DeviceLost):
                await serving

    asyncio.run(asyncio.wait_for(run(), 20))
