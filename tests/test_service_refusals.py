"""What the service refuses: each in OpenAI's form, and a word of a request is in no error, no log line, no metric."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from asynctsqp import Engine
from asynctsqp.config import SamplingOptions
from asynctsqp.service import answering, body, connections
from tests.services import MODEL, POST, Served, assert_error, served, service_process, until

CANARY = "xylophone-quagmire"
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": CANARY}], "max_tokens": 1}
TEXT: dict[str, Any] = {"model": MODEL, "prompt": CANARY, "max_tokens": 1}
Connect = Callable[..., Engine]

UNSUPPORTED = {
    "tools": [{"type": "function", "function": {"name": CANARY}}],
    "functions": [{"name": CANARY}],
    "tool_choice": "required",
    "response_format": {"type": "json_object"},
    "logit_bias": {"50": 100},
    "frequency_penalty": 0.5,
    "presence_penalty": 1,
    "best_of": 2,
    "suffix": CANARY,
    "reasoning_effort": "low",
    "modalities": ["text", "audio"],
    "no_such_parameter": 1,
}
HARMLESS: dict[str, Any] = {
    "user": CANARY,
    "store": True,
    "metadata": {"a": CANARY},
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "logit_bias": {},
    "frequency_penalty": 0,
    "presence_penalty": 0.0,
    "best_of": 1,
    "suffix": None,
    "no_such_parameter": None,
    "parallel_tool_calls": True,
    "stream_options": None,
}
WRONG: list[tuple[str, Any, str]] = [
    ("max_tokens", 0, "max_tokens"),
    ("max_tokens", "10", "max_tokens"),
    ("max_tokens", -1, "max_tokens"),
    ("max_tokens", 1.5, "max_tokens"),
    ("temperature", -1, "temperature"),
    ("temperature", "hot", "temperature"),
    ("top_p", 0, "top_p"),
    ("top_p", 1.1, "top_p"),
    ("top_k", -1, "top_k"),
    ("seed", -1, "seed"),
    ("seed", 1 << 80, "seed"),
    ("n", 0, "n"),
    ("stop", [CANARY, ""], "stop"),
    ("stop", [CANARY] * 17, "stop"),
    ("stop", {"a": CANARY}, "stop"),
    ("stream", CANARY, "stream"),
    ("stream_options", {"include_usage": CANARY}, "stream_options"),
]
BODIES = [
    b"",
    b"{",
    b"[]",
    b'"text"',
    b"null",
    b"\xff\xfe" * 10,
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"model": NaN}',
    json.dumps({"model": MODEL}).encode(),
    json.dumps({"messages": []}).encode(),
    json.dumps({"model": 5, "messages": CANARY}).encode(),
    json.dumps({"model": MODEL, "messages": []}).encode(),
    json.dumps({"model": MODEL, "messages": [{"role": CANARY, "content": "x"}]}).encode(),
    json.dumps({"model": MODEL, "messages": [{"role": "user"}]}).encode(),
    json.dumps({"model": MODEL, "messages": [{"role": "tool", "content": CANARY}]}).encode(),
    json.dumps({"model": MODEL, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}).encode(),
    json.dumps({"model": MODEL, "messages": [{"role": "user", "content": 7}]}).encode(),
    json.dumps({"model": MODEL, "messages": [CANARY]}).encode(),
    b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
]
PROMPTS: list[Any] = ["", [], [[]], [1, "a"], [["a"]], [1, [2]], [49152], [-1], [1 << 70], [True], {"a": 1}, None, 5]


@pytest.fixture
def run(connect: Connect) -> Callable[[Callable[[Served], Any]], None]:
    """Runs a test inside an event loop, on a service."""

    def run(test: Callable[[Served], Any], **options: Any) -> None:
        async def inside() -> None:
            async with connect() as engine, served(engine, **options) as service:
                await test(service)

        asyncio.run(inside())

    return run


def test_unsupported_parameters_are_named(run: Callable[..., None]) -> None:
    async def test(service: Served) -> None:
        for name, value in UNSUPPORTED.items():
            for path, asked in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)):
                response = await service.client.post(path, json=asked | {name: value})
                assert_error(response, 400, "unsupported_parameter", name)
                assert CANARY not in response.text
        for path, asked in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)):
            response = await service.client.post(path, json=asked | HARMLESS)
            assert response.status_code == 200, response.text
        odd = await service.client.post("/v1/completions", json=TEXT | {f"{CANARY} ": 1})
        assert_error(odd, 400, "unsupported_parameter", "?")
        assert CANARY not in odd.text

    run(test)


def test_values_that_make_no_sense_are_named(run: Callable[..., None]) -> None:
    async def test(service: Served) -> None:
        for name, value, param in WRONG:
            for path, asked in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)):
                response = await service.client.post(path, json=asked | {name: value})
                assert_error(response, 400, "invalid_value", param)
                assert CANARY not in response.text
                assert "--" not in response.text, "flags are for the command line"
        for asked, param in (
            ({"top_logprobs": 2}, "top_logprobs"),
            ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ):
            response = await service.client.post("/v1/chat/completions", json=CHAT | asked)
            assert_error(response, 400, "invalid_value", param)

    run(test)


def test_bodies_that_are_no_requests(run: Callable[..., None]) -> None:
    async def test(service: Served) -> None:
        for content in BODIES:
            headers = {"content-type": "application/json; charset=utf-8"}
            response = await service.client.post("/v1/chat/completions", content=content, headers=headers)
            assert response.status_code == 400, content[:80]
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
            assert CANARY not in response.text
        for prompt in PROMPTS:
            response = await service.client.post("/v1/completions", json={"model": MODEL, "prompt": prompt})
            assert response.status_code == 400, prompt
            assert response.json()["error"]["type"] == "invalid_request_error"
        plain = await service.client.post(
            "/v1/completions", content=json.dumps(TEXT), headers={"content-type": "text/plain"}
        )
        assert_error(plain, 415, "unsupported_media_type")
        assert_error(await service.client.get("/v1/completions"), 405, "method_not_allowed")
        assert_error(await service.client.get(f"/v1/{CANARY}"), 404, "not_found")

    run(test)


def test_what_is_too_long_is_refused(run: Callable[..., None]) -> None:
    async def test(service: Served) -> None:
        long = await service.complete(prompt=[5] * 512)
        assert_error(long, 400, "context_length_exceeded")
        assert_error(await service.complete(prompt=[5] * 514, echo=True, max_tokens=0), 400, "context_length_exceeded")
        assert_error(await service.complete(prompt="a" * 20_000), 413, "body_too_large")

        async def parts() -> AsyncIterator[bytes]:
            for _ in range(100):
                yield b" " * 1000

        headers = {"content-type": "application/json"}
        chunked = await service.client.post("/v1/completions", content=parts(), headers=headers)
        assert_error(chunked, 413, "body_too_large")
        waits = await raw(service, POST + b"expect: 100-continue\r\ncontent-length: 20000\r\n\r\n")
        assert waits.startswith(b"HTTP/1.1 413"), "without having asked for the body"
        for n in (257, 1 << 62):  # nothing is made for an n that is refused: no memory and no time
            assert_error(await service.complete(n=n), 400, "too_many_answers")
        assert (await service.complete()).status_code == 200

    run(test, max_body=10_000)


async def raw(service: Served, *parts: bytes) -> bytes:
    """Sends bytes on a connection of its own; -> all that comes back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(service.door.url.rpartition(":")[2]))
    for part in parts:
        writer.write(part)
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    return answer


def test_what_is_too_slow_is_ended(run: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that does not end, a body that does not come: the connection is given up, and others do not notice."""
    monkeypatch.setattr(body, "BODY_S", 0.2)
    monkeypatch.setattr(connections, "HEAD_S", 0.2)

    async def test(service: Served) -> None:
        assert await raw(service) == b""
        assert await raw(service, b"POST /v1/completions HTTP/1.1\r\nhost: te") == b""
        late = await raw(service, POST + b"content-length: 100\r\n\r\n{")
        assert late.startswith(b"HTTP/1.1 408")
        assert json.loads(late.partition(b"\r\n\r\n")[2])["error"]["code"] == "timeout"
        for _ in range(3):  # a connection that is kept alive is not a head that does not end
            assert (await service.complete()).status_code == 200
            await asyncio.sleep(0.3)

    run(test)


def test_bytes_that_are_not_http(run: Callable[..., None]) -> None:
    async def test(service: Served) -> None:
        for sent in (
            b"\x16\x03\x01\x02\x00" * 30,
            b"GET\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
        ):
            answer = await raw(service, sent)
            assert answer.startswith(b"HTTP/1.1 400")
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"
        assert (await service.complete()).status_code == 200

    run(test)


def test_a_request_that_takes_too_long_is_ended(connect: Connect, tiny_model: Callable[[str], Path]) -> None:
    async def test() -> None:
        async with (
            Engine.launch(tiny_model("22-layers"), threads=1) as engine,
            served(engine, max_seconds=1) as service,
        ):
            whole = await service.complete(max_tokens=4000)
            assert_error(whole, 504, "timeout")
            stream = await service.complete(max_tokens=4000, stream=True)
            assert stream.status_code == 200, "it had begun"
            *events, last = stream.text.strip().split("\n\n")
            assert len(events) > 3
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
            await until(lambda: engine.meter.running == 0, 1)

    asyncio.run(test())


def test_a_defect_says_where_and_not_what(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise LookupError(CANARY)

    async def test(service: Served) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(answering, "joined", broken)
            assert_error(await service.complete(), 500, "internal_error")
        assert (await service.complete()).status_code == 200

    run(test)
    said = capsys.readouterr().err
    assert "LookupError in broken" in said
    assert CANARY not in said


def test_a_canary_is_heard_nowhere(tiny_model: Callable[[str], Path]) -> None:
    """In a path, a header, a key, bodies good and bad: not in the log, not in the metrics, not in an error."""
    import httpx

    with (
        service_process(tiny_model("gqa"), "--max-new-tokens", "8", "--tls", "on", "--threads", "1") as service,
        httpx.Client(base_url=service.url, verify=False) as client,
    ):
        name = client.get("/v1/models").json()["data"][0]["id"]
        heard = [client.get("/metrics").text]
        for asked in (CHAT, TEXT, TEXT | {"stream": True, "max_tokens": 8}):
            path = "/v1/chat/completions" if "messages" in asked else "/v1/completions"
            assert client.post(path, json=asked | {"model": name}).status_code == 200
            changes = (
                {"model": CANARY},
                {"max_tokens": CANARY},
                {CANARY: CANARY},
                {"top_p": 7},
                {"prompt": {CANARY: 1}},
            )
            heard += [client.post(path, json=asked | {"model": name} | change).text for change in changes]
        long = client.post("/v1/completions", json={"model": name, "prompt": f"{CANARY} " * 600})
        assert_error(long, 400, "context_length_exceeded")
        heard.append(long.text)
        paths = (f"/{CANARY}", f"/v1/models/{CANARY}", f"/v1/completions?a={CANARY}", f"/metrics?a={CANARY}")
        headers = {"authorization": f"Bearer {CANARY}", "x-a": CANARY}
        heard += [client.get(path, headers=headers).text for path in paths]
        heard.append(client.get("/metrics").text)
        assert service.end() == 0
        heard.append(service.said())
    assert all(heard)
    assert not [text for text in heard if CANARY in text or "xylophone" in text]


def test_defaults_are_those_of_the_command(run: Callable[..., None]) -> None:
    async def test(service: Served) -> None:
        done = (await service.complete()).json()
        assert done["usage"]["completion_tokens"] == 3
        assert (await service.complete(max_tokens=2)).json()["usage"]["completion_tokens"] == 2

    run(test, sampling=SamplingOptions(max_new_tokens=3, temperature=0, ignore_eos=True))


@pytest.mark.parametrize("keys", [False, True])
def test_a_web_page_cannot_reach_it_under_a_name_of_its_own(
    keys: bool, run: Callable[..., None], tmp_path: Path
) -> None:
    """DNS rebinding: a browser takes evil.example for the page's own host, and it has become 127.0.0.1."""
    file = tmp_path / "keys"
    file.write_text("key\n")
    file.chmod(0o600)

    async def test(service: Served) -> None:
        for host in ("evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil.example", "[::2]:1"):
            for path in ("/v1/models", "/metrics", "/health"):
                headers = {"host": host, "authorization": "Bearer key"}
                response = await service.client.get(path, headers=headers)
                if keys:  # which no page of a stranger has
                    assert response.status_code == 200
                else:
                    assert_error(response, 403, "unknown_host")
        for host in ("localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:8000", "a.localhost"):
            assert (await service.client.get("/health", headers={"host": host})).status_code == 200, host

    run(test, **({"api_keys": str(file)} if keys else {}))
