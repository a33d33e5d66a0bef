"""Many clients, clients that leave or do not read, a GPU side that goes and comes back, and the end of the service."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from asynctsqp import Engine, IntegrityError
from asynctsqp.messages import Call, Done
from asynctsqp.service import answering, connections
from tests.conftest import GpuProcess
from tests.peers import lying_gpu
from tests.services import LONG, POST, Served, assert_error, served, service_process, until

Connect = Callable[..., Engine]
FAST_S = 0.5  # what is freed at once is freed within this, on a busy machine; a long answer takes ten seconds and more
PROMPT = [1, *range(100, 140)]


@pytest.fixture
def long_model(tiny_model: Callable[[str], Path]) -> Path:
    """Its context is long enough for answers that take ten seconds and more."""
    return tiny_model("22-layers")


def run_on(model: Path, test: Callable[[Served], Any], **options: Any) -> None:
    async def inside() -> None:
        async with Engine.launch(model, threads=1) as engine, served(engine, **options) as service:
            await test(service)

    asyncio.run(inside())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_request_at_once(stream: bool, long_model: Path) -> None:
    async def test(service: Served) -> None:
        meter = service.engine.meter
        clients = [await service.begin(stream=stream, n=2) for _ in range(3)]
        await until(lambda: meter.running == 6)
        if stream:
            for reader, _ in clients:
                await reader.readuntil(b"data: ")
        for left, (_, writer) in enumerate(clients, 1):
            writer.close()
            await until(lambda left=left: meter.running == 6 - 2 * left, FAST_S)  # type: ignore[misc]
        assert (await service.metrics())["asynctsqp_requests_admitted"] == 0

    run_on(long_model, test)


def test_a_client_that_leaves_before_its_turn(long_model: Path) -> None:
    """It waits for room for keys and values."""

    async def run() -> None:
        one = 22 * 2 * 2 * 16 * 4 * 4096  # layers, keys and values, heads, dimensions, bytes, tokens
        async with Engine.launch(long_model, threads=1, kv_memory=one) as engine, served(engine) as service:
            _, first = await service.begin()
            _, second = await service.begin()
            await until(lambda: (engine.meter.running, engine.waiting) == (1, 1))
            told = await service.metrics()
            assert told["asynctsqp_requests_running"] == told["asynctsqp_requests_waiting"] == 1
            second.close()
            await until(lambda: (engine.meter.running, engine.waiting) == (1, 0), FAST_S)
            first.close()
            await until(lambda: engine.meter.running == 0, FAST_S)

    asyncio.run(run())


def test_more_than_the_limit_are_told_to_come_again(long_model: Path) -> None:
    async def test(service: Served) -> None:
        _, writer = await service.begin(n=2, stream=True)
        await until(lambda: service.engine.meter.running == 2)
        for stream in (False, True):
            refused = await service.complete(stream=stream, n=2)
            assert_error(refused, 429, "rate_limit_exceeded")
            assert int(refused.headers["retry-after"]) >= 1
        assert (await service.complete()).status_code == 200, "one more fits"
        assert (await service.client.get("/health")).status_code == 200
        writer.close()
        await until(lambda: service.engine.meter.running == 0)
        assert (await service.complete(n=3)).status_code == 200

    run_on(long_model, test, max_requests=3)


def read_to_the_end(connection: socket.socket) -> bytes:
    """A connection that is not cut has no end: a timeout."""
    text = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            text += part
    return text


def test_a_client_that_does_not_read_is_ended(long_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has not taken is bounded; its request is freed, its connection is cut, and others are answered."""
    monkeypatch.setattr(answering, "MOST_UNREAD", 16)
    monkeypatch.setattr(connections, "WRITE_S", 1.0)

    async def test(service: Served) -> None:
        service.door.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # connections inherit it
        with socket.socket() as lazy:
            lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            lazy.setblocking(False)
            await asyncio.get_running_loop().sock_connect(lazy, ("127.0.0.1", int(service.door.url.rpartition(":")[2])))
            asked = httpx.Request("POST", "http://a", json=LONG | {"stream": True, "logprobs": 20}).read()
            lazy.send(POST + f"content-length: {len(asked)}\r\n\r\n".encode() + asked)
            await until(lambda: service.engine.meter.running == 1)
            began = time.monotonic()
            while service.engine.meter.running:
                assert (await service.complete(max_tokens=1)).status_code == 200
                assert time.monotonic() - began < 15, "it fills its buffers within seconds"
            await asyncio.sleep(1.5)
            lazy.setblocking(True)
            lazy.settimeout(5)
            assert b"[DONE]" not in read_to_the_end(lazy)
        assert (await service.metrics())["asynctsqp_requests_admitted"] == 0

    run_on(long_model, test)


def test_a_gpu_side_that_is_lost_and_comes_back(
    tiny_model: Callable[[str], Path], start_gpu: Callable[..., GpuProcess]
) -> None:
    model = tiny_model("22-layers")

    async def run() -> None:
        gpu = start_gpu(model)
        async with Engine.connect(model, gpu.endpoint, threads=1) as engine, served(engine) as service:
            before = (await service.complete(prompt=PROMPT)).json()["choices"]
            whole = asyncio.create_task(service.complete(max_tokens=4000))
            stream = asyncio.create_task(service.complete(max_tokens=4000, stream=True))
            await until(lambda: engine.meter.running == 2 and engine.meter.round_trips()[-1] > 2000)
            await asyncio.to_thread(gpu.kill)
            assert_error(await whole, 503, "gpu_side_unavailable")
            last = (await stream).text.strip().rpartition("data: ")[2]
            assert json.loads(last)["error"]["code"] == "gpu_side_unavailable"
            ill = await service.client.get("/health")
            assert (ill.status_code, ill.json()["reason"]) == (503, "gpu_side_unavailable")
            assert (await service.metrics())["asynctsqp_up"] == 0
            later = await service.complete()
            assert_error(later, 503, "gpu_side_unavailable")
            assert gpu.endpoint not in later.text
            await asyncio.to_thread(start_gpu, model, "--bind", gpu.endpoint)
            await until(lambda: engine.failure is None)
            assert (await service.client.get("/health")).json() == {"status": "ok"}
            assert (await service.complete(prompt=PROMPT)).json()["choices"] == before
            assert (await service.metrics())["asynctsqp_up"] == 1

    asyncio.run(run())


@pytest.mark.parametrize("lies", [False, True])
def test_a_lie_is_caught_counted_and_told(lies: bool, tiny_model: Callable[[str], Path], tiny_gpu: GpuProcess) -> None:
    """With checks a GPU side whose answers are never written fails the first one; an honest one fails none."""

    async def run(endpoint: str) -> None:
        options = {"protect": "full", "threads": 1, "mask_memory": "64M", "transport": "binary"}
        async with Engine.connect(tiny_model("gqa"), endpoint, **options) as engine, served(engine) as service:
            answer = await service.complete()
            told = await service.metrics()
            health = (await service.client.get("/health")).json()
            if lies:
                assert_error(answer, 502, "integrity_violation")
                assert told["asynctsqp_integrity_failures_total"] == 1
                assert health == {"status": "unavailable", "reason": "integrity_violation"}
                assert isinstance(engine.failure, IntegrityError)
                assert_error(await service.complete(), 502, "integrity_violation")
            else:
                assert answer.status_code == 200, answer.text
                assert told["asynctsqp_integrity_failures_total"] == 0
                assert health == {"status": "ok"}
                assert await engine.prepare_masks(64) >= 64
                assert (await service.metrics())["asynctsqp_mask_bank_tokens"] >= 64

    if not lies:
        asyncio.run(run(tiny_gpu.endpoint))
        return

    def zeros(call: Call) -> list[list[Any]]:
        return [[Done(call.call_id, 0.0, 0.0), bytes(4 * 128 * call.rows)]]

    with lying_gpu({Call: zeros}) as peer:
        asyncio.run(run(peer.endpoint))


def test_metrics_tell_what_happened(connect: Connect) -> None:
    async def run() -> None:
        async with connect() as engine, served(engine) as service:
            before = await service.metrics()
            done = [await service.complete(max_tokens=5) for _ in range(2)]
            done.append(await service.complete(max_tokens=4, stream=True))
            await service.complete(max_tokens=-1)
            told = await service.metrics()
            assert [response.status_code for response in done] == [200] * 3
            assert told["asynctsqp_time_to_first_token_seconds_count"] == 3
            assert told["asynctsqp_inter_token_seconds_count"] == 4 + 4 + 3
            assert told["asynctsqp_http_requests_total{path=/v1/completions,status=200}"] == 3
            assert told["asynctsqp_http_requests_total{path=/v1/completions,status=400}"] == 1
            assert told["asynctsqp_rpc_round_trip_seconds_count"] == 14 * (4 * 3 + 1)
            assert told["asynctsqp_rpc_round_trip_seconds_bucket{le=+Inf}"] == 14 * (4 * 3 + 1)
            assert told["asynctsqp_rpc_sent_bytes_total"] > 0
            assert told["asynctsqp_rpc_received_bytes_total"] > 0
            assert 0 < told["asynctsqp_gpu_wait_share"] < 1
            assert "asynctsqp_mask_bank_tokens" not in told
            assert before["asynctsqp_rpc_round_trip_seconds_count"] == 0

    asyncio.run(run())


def test_two_services_share_nothing(connect: Connect) -> None:
    async def run() -> None:
        async with connect() as engine:
            for _ in range(2):
                async with served(engine) as service:
                    await service.complete()
                    assert (await service.metrics())["asynctsqp_time_to_first_token_seconds_count"] == 1

    asyncio.run(run())


def test_many_at_once_get_their_own_answers(connect: Connect) -> None:
    prompts = [[1, *range(start, start + size)] for size, start in enumerate(range(100, 4100, 100), 1)]

    async def run() -> None:
        async with connect() as engine, served(engine) as service:
            asked: list[dict[str, Any]] = [{"prompt": prompt, "max_tokens": 8, "logprobs": 0} for prompt in prompts]
            alone = [(await service.complete(**one)).json()["choices"][0]["logprobs"]["tokens"] for one in asked]
            at_once = await asyncio.gather(*(service.complete(**one) for one in asked))
            assert [one.json()["choices"][0]["logprobs"]["tokens"] for one in at_once] == alone
            for prompt, tokens in zip(prompts[:3], alone[:3], strict=True):
                done = await engine.complete(prompt, max_new_tokens=8, temperature=0, ignore_eos=True, logprobs=0)
                assert "".join(tokens).startswith(done.text[:4])

    asyncio.run(run())


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_sigterm_lets_requests_end(loop: str, tiny_model: Callable[[str], Path]) -> None:
    flags = ("--loop", loop, "--threads", "1", "--temperature", "0", "--ignore-eos", "--tls", "on")
    with service_process(tiny_model("gqa"), *flags) as service, httpx.Client(verify=False, timeout=30) as client:
        name = client.get(f"{service.url}/v1/models").json()["data"][0]["id"]
        asked = {"model": name, "prompt": PROMPT, "max_tokens": 400, "stream": True}
        with client.stream("POST", f"{service.url}/v1/completions", json=asked) as response:
            lines = response.iter_lines()
            next(lines)
            service.process.send_signal(signal.SIGTERM)
            text = list(lines)
        assert text[-2:] == ["data: [DONE]", ""]
        assert service.end() == 0
        with pytest.raises(httpx.ConnectError):
            client.get(f"{service.url}/health")


def test_what_does_not_drain_is_ended(long_model: Path) -> None:
    flags = ("--threads", "1", "--ignore-eos", "--drain-s", "0.5")
    with service_process(long_model, *flags) as service, httpx.Client(base_url=service.url, timeout=30) as client:
        name = client.get("/v1/models").json()["data"][0]["id"]
        asked = {"model": name, "prompt": PROMPT, "max_tokens": 4000, "stream": True}
        with client.stream("POST", "/v1/completions", json=asked) as response:
            lines = response.iter_lines()
            next(lines)
            asked_at = time.monotonic()
            service.process.send_signal(signal.SIGTERM)
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert service.end() == 0
        assert time.monotonic() - asked_at < 5


def test_sigint_ends_as_an_interruption(tiny_model: Callable[[str], Path]) -> None:
    with service_process(tiny_model("gqa"), "--threads", "1") as service:
        assert service.end(signal.SIGINT) == 130
        assert service.said().splitlines()[-1] == "asynctsqp.tee: interrupted"
