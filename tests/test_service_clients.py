"""The service as its users meet it: the real openai client and curl, over TLS, with the demo model."""

from __future__ import annotations

import asyncio
import json
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from asynctsqp import Engine
from tests.services import ServiceProcess, service_process

KEY = "a-key-of-these-tests-0123456789abcdef"
NAME = "smollm2-135m-instruct"
MESSAGES: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
TEXT = "Once upon a time, in a small village"
TOKENS = 16


@pytest.fixture(scope="module")
def certificate(service: ServiceProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one that was made at start, trusted as an authority."""
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    path.write_text(service.certificate())
    return path


@pytest.fixture(scope="module")
def service(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"# of the tests\nanother-key\n\n{KEY}\n")
    keys.chmod(0o600)
    flags = ("--tls", "on", "--api-keys", str(keys), "--temperature", "0")
    with service_process(demo_model, *flags) as process:
        yield process


@pytest.fixture
def client(service: ServiceProcess, certificate: Path) -> Iterator[openai.OpenAI]:
    context = ssl.create_default_context(cafile=str(certificate))
    with (
        httpx.Client(verify=context, timeout=60) as http,
        openai.OpenAI(api_key=KEY, base_url=f"{service.url}/v1", http_client=http, max_retries=0) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def expected(demo_model: Path) -> dict[str, list[int]]:
    """transformers' own greedy tokens for the two prompts."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    model = LlamaForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    chat = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    text = tokenizer(TEXT, return_tensors="pt")
    found = {}
    for name, prompt in (("chat", chat), ("text", text)):
        with torch.no_grad():
            made = model.generate(**prompt, max_new_tokens=TOKENS, do_sample=False)
        found[name] = made[0, prompt["input_ids"].shape[1] :].tolist()
    return found


def text_of(demo_model: Path, tokens: list[int]) -> str:
    return str(AutoTokenizer.from_pretrained(demo_model).decode(tokens, skip_special_tokens=True))


def test_answers_are_those_of_transformers_and_of_the_engine(
    client: openai.OpenAI, demo_model: Path, expected: dict[str, list[int]]
) -> None:
    async def engine() -> list[list[int]]:
        async with Engine.launch(demo_model, threads=1) as engine:
            done = [await engine.complete(prompt, max_new_tokens=TOKENS, temperature=0) for prompt in (MESSAGES, TEXT)]
            return [answer.token_ids for answer in done]

    assert asyncio.run(engine()) == [expected["chat"], expected["text"]]
    chat = client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=TOKENS)
    assert chat.choices[0].message.content == text_of(demo_model, expected["chat"])
    assert chat.choices[0].finish_reason == "stop"
    assert chat.usage is not None
    assert chat.usage.completion_tokens == len(expected["chat"])
    assert chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens
    text = client.completions.create(model=NAME, prompt=TEXT, max_tokens=TOKENS)
    assert text.choices[0].text == text_of(demo_model, expected["text"])
    assert text.choices[0].finish_reason == "length"


def test_a_stream_adds_up_to_the_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=NAME, messages=MESSAGES, max_completion_tokens=TOKENS)
    stream = client.chat.completions.create(
        model=NAME,
        messages=MESSAGES,
        max_completion_tokens=TOKENS,
        stream=True,
        stream_options={"include_usage": True},
    )
    events = list(stream)
    assert events[0].choices[0].delta.role == "assistant"
    text = "".join(choice.delta.content or "" for event in events for choice in event.choices)
    assert text == whole.choices[0].message.content
    assert [choice.finish_reason for event in events for choice in event.choices][-1] == "stop"
    assert events[-1].usage == whole.usage
    assert not events[-1].choices
    assert len({event.id for event in events}) == 1


def test_a_stream_of_text_says_no_usage_unless_asked(client: openai.OpenAI) -> None:
    events = list(client.completions.create(model=NAME, prompt=TEXT, max_tokens=4, stream=True))
    assert all(event.usage is None for event in events)
    assert events[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize("stop", ["France", ["never comes", "France"]])
def test_a_stop_ends_before_its_text(stop: Any, client: openai.OpenAI) -> None:
    done = client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=TOKENS, stop=stop)
    assert done.choices[0].message.content == "The capital of "
    assert done.choices[0].finish_reason == "stop"


def test_a_seed_is_an_answer(client: openai.OpenAI) -> None:
    def sampled(seed: int) -> str:
        done = client.completions.create(
            model=NAME, prompt=TEXT, max_tokens=8, seed=seed, temperature=1.2, top_p=0.95, extra_body={"top_k": 50}
        )
        return done.choices[0].text

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in (1, 2)}) > 1


def test_several_answers_have_several_seeds(client: openai.OpenAI) -> None:
    done = client.completions.create(
        model=NAME, prompt=[TEXT, "Hello"], n=2, max_tokens=8, seed=1, temperature=1.5, top_p=0.99
    )
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    assert done.choices[0].text != done.choices[1].text
    alone = client.completions.create(model=NAME, prompt=TEXT, max_tokens=8, seed=2, temperature=1.5, top_p=0.99)
    assert done.choices[1].text == alone.choices[0].text
    assert done.usage is not None
    assert done.usage.completion_tokens == 32


def test_logprobs_of_a_chat(client: openai.OpenAI, demo_model: Path, expected: dict[str, list[int]]) -> None:
    done = client.chat.completions.create(
        model=NAME, messages=MESSAGES, max_tokens=TOKENS, logprobs=True, top_logprobs=3
    )
    assert done.choices[0].logprobs is not None
    content = done.choices[0].logprobs.content or []
    assert len(content) == len(expected["chat"])
    for token in content:
        assert token.bytes is not None
        assert bytes(token.bytes).decode() == token.token
        assert [one.logprob for one in token.top_logprobs] == sorted(
            (o.logprob for o in token.top_logprobs), reverse=True
        )
        assert token.logprob == token.top_logprobs[0].logprob, "greedy"
    none = client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=2)
    assert none.choices[0].logprobs is None


def test_echo_scores_the_prompt_as_transformers_does(client: openai.OpenAI, demo_model: Path) -> None:
    """As evaluation harnesses ask: max_tokens 0 or 1, the prompt as text or as tokens."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    tokens = tokenizer(TEXT)["input_ids"]
    model = LlamaForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    with torch.no_grad():
        scores = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    wanted = [None, *(float(scores[place, token]) for place, token in enumerate(tokens[1:]))]
    for prompt, most in ((TEXT, 0), (tokens, 1), ([tokens, tokens], 0)):
        done = client.completions.create(
            model=NAME, prompt=prompt, max_tokens=most, echo=True, logprobs=1, temperature=0, seed=1234
        )
        for choice in done.choices:
            assert choice.text.startswith(TEXT)
            assert choice.logprobs is not None
            got = (choice.logprobs.token_logprobs or [])[: len(tokens)]
            assert got[0] is None
            assert got[1:] == pytest.approx(wanted[1:], abs=1e-3)
            assert len(choice.logprobs.token_logprobs or []) == len(tokens) + most
            assert "".join(choice.logprobs.tokens or []) == choice.text
            for offset, token in zip(choice.logprobs.text_offset or [], choice.logprobs.tokens or [], strict=True):
                assert choice.text[offset:].startswith(token)


def test_a_streamed_echo_has_the_same_logprobs(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": NAME, "prompt": TEXT, "max_tokens": 4, "echo": True, "logprobs": 2}
    whole = client.completions.create(**asked).choices[0].logprobs
    events = list(client.completions.create(**asked, stream=True))
    parts = [event.choices[0].logprobs for event in events]
    assert whole is not None
    assert [token for part in parts if part for token in part.tokens or []] == whole.tokens
    assert [offset for part in parts if part for offset in part.text_offset or []] == whole.text_offset


def test_tools_are_a_clear_error(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    with pytest.raises(openai.BadRequestError, match="tools is not supported") as refused:
        client.chat.completions.create(model=NAME, messages=MESSAGES, tools=[tool])
    assert refused.value.code == "unsupported_parameter"
    assert refused.value.param == "tools"


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")
    with pytest.raises(openai.NotFoundError) as refused:
        client.completions.create(model="another", prompt=TEXT)
    assert refused.value.code == "model_not_found"


def test_a_wrong_key_is_refused(client: openai.OpenAI) -> None:
    for key in ("wrong", KEY[:-1], KEY + "x", "another-key-"):
        with pytest.raises(openai.AuthenticationError) as refused:
            client.with_options(api_key=key).models.list()
        assert refused.value.code == "invalid_api_key"
    assert client.with_options(api_key="another-key").models.list().data


def test_without_the_certificate_there_is_no_connection(service: ServiceProcess) -> None:
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"), httpx.Client() as client:
        client.get(f"{service.url}/health")


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(service: ServiceProcess, certificate: Path) -> None:
    def curl(path: str, *flags: str) -> str:
        command = ["curl", "--silent", "--show-error", "--no-buffer", "--cacert", str(certificate), *flags]
        return subprocess.run(
            [*command, service.url + path], capture_output=True, text=True, check=True, timeout=60
        ).stdout

    key = ("-H", f"Authorization: Bearer {KEY}", "-H", "Content-Type: application/json")
    asked = {"model": NAME, "messages": MESSAGES, "max_tokens": TOKENS}
    answer = json.loads(curl("/v1/chat/completions", *key, "-d", json.dumps(asked)))
    assert answer["choices"][0]["message"]["content"] == "The capital of France is Paris."
    lines = curl("/v1/chat/completions", *key, "-d", json.dumps(asked | {"stream": True})).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    text = "".join(choice["delta"].get("content", "") for event in events for choice in event["choices"])
    assert text == "The capital of France is Paris."
    assert json.loads(curl("/v1/models"))["error"]["code"] == "invalid_api_key"
    assert json.loads(curl("/health")) == {"status": "ok"}
    pin = service.said().split("(sha256//")[1].split(")")[0]
    assert json.loads(curl("/health", "--insecure", "--pinnedpubkey", f"sha256//{pin}")) == {"status": "ok"}
    with pytest.raises(subprocess.CalledProcessError):
        curl("/health", "--insecure", "--pinnedpubkey", f"sha256//{'A' * 43}=")
