"""Services under test: as a process of their own, and inside the test, where what takes long may be made short."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import ssl
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from prometheus_client.parser import text_string_to_metric_families

from asynctsqp import Engine
from asynctsqp.config import SamplingOptions
from asynctsqp.service.attestation import Evidence
from asynctsqp.service.options import Address, ServiceOptions
from asynctsqp.service.server import Door, serve
from tests.processes import ROOT

MODEL = "tiny"  # the name of what is served inside a test
SAMPLING = SamplingOptions(max_new_tokens=16, temperature=0, ignore_eos=True)
POST = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
LONG: dict[str, Any] = {"model": MODEL, "prompt": [1, *range(100, 140)], "max_tokens": 4000}


class ServiceProcess:
    """`python -m asynctsqp.tee --serve`."""

    def __init__(self, model: Path, *flags: str, serve: str = "127.0.0.1:0") -> None:
        command = [sys.executable, "-m", "asynctsqp.tee", "--model", str(model), "--serve", serve, *flags]
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # closed in close()
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._said, cwd=ROOT, text=True
        )
        assert self.process.stdout is not None
        word, _, self.url = self.process.stdout.readline().strip().partition(" ")
        assert word == "serving", self.said()
        self.host, self.port = urlsplit(self.url).hostname or "", urlsplit(self.url).port or 0

    def said(self) -> str:
        """On standard error, so far."""
        self._said.seek(0)
        return self._said.read().decode()

    def certificate(self) -> str:
        """In PEM, from a TLS handshake."""
        return ssl.get_server_certificate((self.host, self.port))

    def end(self, number: int = signal.SIGTERM, timeout_s: float = 20) -> int:
        """-> exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(timeout_s)
        finally:
            self.process.kill()
            self.process.wait()
            if self.process.stdout is not None:
                self.process.stdout.close()

    def close(self) -> None:
        self.end()
        self._said.close()


@contextlib.contextmanager
def service_process(model: Path, *flags: str, serve: str = "127.0.0.1:0") -> Iterator[ServiceProcess]:
    process = ServiceProcess(model, *flags, serve=serve)
    try:
        yield process
    finally:
        process.close()


@dataclass(frozen=True)
class Served:
    """A service inside the test."""

    client: httpx.AsyncClient
    engine: Engine
    door: Door

    async def complete(self, **asked: Any) -> httpx.Response:
        return await self.client.post("/v1/completions", json={"model": MODEL, "prompt": [1, 2, 3]} | asked)

    async def metrics(self) -> dict[str, float]:
        return numbers((await self.client.get("/metrics")).text)

    async def begin(self, **asked: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A request for a long answer, on a bare connection."""
        body = httpx.Request("POST", self.door.url + "/v1/completions", json=LONG | asked).read()
        port = urlsplit(self.door.url).port
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        writer.write(POST + f"content-length: {len(body)}\r\n\r\n".encode() + body)
        return reader, writer


@contextlib.asynccontextmanager
async def served(
    engine: Engine, sampling: SamplingOptions = SAMPLING, evidence: Evidence | None = None, **options: Any
) -> AsyncIterator[Served]:
    """On a running engine; ends as after SIGTERM."""
    loop = asyncio.get_running_loop()
    door = Door(Address.parse("127.0.0.1:0"), ServiceOptions(**({"drain_s": 0} | options)), engine.options)
    service = asyncio.create_task(serve(door, engine, MODEL, sampling, evidence))
    try:
        async with httpx.AsyncClient(base_url=door.url, timeout=30) as client:
            await answers(client)
            yield Served(client, engine, door)
        assert not service.done()
        os.kill(os.getpid(), signal.SIGTERM)
        assert await asyncio.wait_for(service, 20) == signal.SIGTERM
    finally:
        service.cancel()
        await asyncio.gather(service, return_exceptions=True)
        door.close()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


async def answers(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(10):
        while True:
            with contextlib.suppress(httpx.TransportError):
                await client.get("/health")
                return
            await asyncio.sleep(0.01)


async def until(true: Callable[[], bool], timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not true():
            await asyncio.sleep(0.005)


def numbers(text: str) -> dict[str, float]:
    """name{label="value"} -> value, of Prometheus's text format."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def assert_error(response: httpx.Response, status: int, code: str, param: str | None = None) -> None:
    """OpenAI's form."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    assert error["message"]
