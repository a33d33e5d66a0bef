"""Whatever the GPU side sends, the TEE side ends with one clear error, soon, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import posix_ipc
import pytest
import torch

import asynctsqp
from asynctsqp import rpc
from asynctsqp.errors import GpuSideLost, HandshakeRefused, ProtocolError
from asynctsqp.messages import Alive, Attach, Attached, Call, Done, Hello, Refused, Welcome
from asynctsqp.model_spec import ModelSpec, Op
from tee_side import link
from tests.peers import Lie, LyingGpu, attached, lying_gpu
from tests.processes import shared_memory_names

PROMPT = [1, 100, 200, 300]
LONG_REASON = "line\n\x1b[31m" * 300


def answer(model: Path, endpoint: str, **options: Any) -> asynctsqp.Completion:
    """A short answer from a GPU side, in at most ten seconds."""

    async def run() -> asynctsqp.Completion:
        async with asynctsqp.Engine.connect(model, endpoint, doorbell="off", **options) as engine:
            return await engine.complete(PROMPT, max_new_tokens=2, temperature=0, ignore_eos=True)

    return asyncio.run(asyncio.wait_for(run(), 10))


def assert_one_line(error: BaseException) -> None:
    text = str(error)
    assert text, "an error without words"
    assert text.isprintable(), f"more than one line, or control characters: {text[:80]!r}"
    assert len(text) < 1000


def zeros(model: Path, extra: int = 0) -> Lie:
    """A well-formed answer of a binary GPU side, `extra` bytes too long."""
    spec = ModelSpec.read(model / "config.json")

    def lie(call: Any) -> list[list[Any]]:
        return [[Done(call.call_id, 0.0, 0.0), bytes(call.rows * spec.linears[Op(call.op)].out_features * 4 + extra)]]

    return lie


def done(call_id: int) -> bytes:
    return msgspec.msgpack.encode([13, call_id, 0.0, 0.0])


CALL_LIES: dict[str, Lie] = {
    "undecodable bytes": lambda call: [[b"\xc1\xff garbage"]],
    "an empty message": lambda call: [[b""]],
    "an unknown kind of message": lambda call: [[msgspec.msgpack.encode([99, call.call_id])]],
    "a message for the other direction": lambda call: [[call]],
    "too few fields": lambda call: [[msgspec.msgpack.encode([13, call.call_id, 0.0])]],
    "too many fields": lambda call: [[msgspec.msgpack.encode([13, call.call_id, 0.0, 0.0, None, 0])]],
    "fields of other types": lambda call: [[msgspec.msgpack.encode([13, "one", None, None])]],
    "text that is no text": lambda call: [[b"\x94\x0e" + msgspec.msgpack.encode(call.call_id) + b"\xa1\xff\xc2"]],
    "a deeply nested message": lambda call: [[b"\x91" * 100_000]],
    "an unknown call": lambda call: [[Done(call.call_id + 1000, 0.0, 0.0)]],
    "a negative call": lambda call: [[Done(-1, 0.0, 0.0)]],
    "a call of the past": lambda call: [[Welcome(0, "cpu")]],
    "a welcome": lambda call: [[Welcome(call.call_id, "cpu")]],
    "an attached": lambda call: [[Attached(call.call_id, b"")]],
    "three frames": lambda call: [[Done(call.call_id, 0.0, 0.0), b"", b""]],
    "a hundred frames": lambda call: [[Done(call.call_id, 0.0, 0.0), *[b"x"] * 100]],
    "the answer twice": lambda call: [[Done(call.call_id, 0.0, 0.0)]] * 2,
    "nothing inside the message": lambda call: [[Done(call.call_id, 0.0, 0.0, tensors=b"")]],
    "a tensor of one byte inside the message": lambda call: [[Done(call.call_id, 0.0, 0.0, tensors=b"x")]],
    "a tensor inside and one beside": lambda call: [[Done(call.call_id, 0.0, 0.0, tensors=b"x"), b"x"]],
    "a refusal of many lines": lambda call: [[Refused(call.call_id, LONG_REASON, bad_input=True)]],
    "an empty refusal": lambda call: [[Refused(call.call_id, "", bad_input=False)]],
}


@pytest.mark.parametrize("transport", ["shm", "binary", "msgpack"])
@pytest.mark.parametrize("name", CALL_LIES)
def test_a_lie_about_a_call_ends_with_one_error(name: str, transport: str, tiny_model: Callable[[str], Path]) -> None:
    with lying_gpu({Call: CALL_LIES[name]}) as gpu, pytest.raises(asynctsqp.GpuSideError) as caught:
        answer(tiny_model("gqa"), gpu.endpoint, transport=transport)
    assert_one_line(caught.value)
    assert not shared_memory_names()


@pytest.mark.parametrize("extra", [-1, 1, 1 << 20])
def test_a_tensor_of_another_size_is_refused(extra: int, tiny_model: Callable[[str], Path]) -> None:
    model = tiny_model("gqa")
    with lying_gpu({Call: zeros(model, extra)}) as gpu, pytest.raises(asynctsqp.GpuSideError) as caught:
        answer(model, gpu.endpoint, transport="binary")
    assert_one_line(caught.value)


def test_no_tensor_where_one_is_due_is_refused(tiny_model: Callable[[str], Path]) -> None:
    with (
        lying_gpu({Call: lambda call: [[Done(call.call_id, 0.0, 0.0)]]}) as gpu,
        pytest.raises(asynctsqp.GpuSideError) as caught,
    ):
        answer(tiny_model("gqa"), gpu.endpoint, transport="binary")
    assert_one_line(caught.value)


def test_a_tensor_frame_beside_shared_memory_is_refused(tiny_model: Callable[[str], Path]) -> None:
    model = tiny_model("gqa")
    with lying_gpu({Call: zeros(model)}) as gpu, pytest.raises(asynctsqp.GpuSideError) as caught:
        answer(model, gpu.endpoint, transport="shm")
    assert_one_line(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_do_not_break_the_sampler(value: float, tiny_model: Callable[[str], Path]) -> None:
    model = tiny_model("gqa")
    spec = ModelSpec.read(model / "config.json")

    def lie(call: Any) -> list[list[Any]]:
        return [
            [
                Done(call.call_id, value, value),
                torch.full((call.rows, spec.linears[Op(call.op)].out_features), value),
            ]
        ]

    def as_bytes(call: Any) -> list[list[Any]]:
        return [[message, tensor.numpy().tobytes()] for message, tensor in lie(call)]

    async def run(endpoint: str) -> asynctsqp.Completion:
        async with asynctsqp.Engine.connect(model, endpoint, doorbell="off", transport="binary") as engine:
            return await engine.complete(PROMPT, max_new_tokens=2, temperature=1.0, seed=1, ignore_eos=True)

    with lying_gpu({Call: as_bytes}) as gpu, pytest.raises(asynctsqp.GpuSideError) as caught:
        asyncio.run(asyncio.wait_for(run(gpu.endpoint), 10))
    assert_one_line(caught.value)


HELLO_LIES: dict[str, Lie] = {
    "undecodable bytes": lambda hello: [[b"\xc1"]],
    "an answer to a call": lambda hello: [[Done(hello.call_id, 0.0, 0.0)]],
    "another call's answer": lambda hello: [[Welcome(7, "cpu")]],
    "three frames": lambda hello: [[Welcome(hello.call_id, "cpu"), b"", b""]],
    "nothing inside the message": lambda call: [[Done(call.call_id, 0.0, 0.0, tensors=b"")]],
    "a tensor of one byte inside the message": lambda call: [[Done(call.call_id, 0.0, 0.0, tensors=b"x")]],
    "a tensor inside and one beside": lambda call: [[Done(call.call_id, 0.0, 0.0, tensors=b"x"), b"x"]],
    "a refusal of many lines": lambda hello: [[Refused(hello.call_id, LONG_REASON, bad_input=False)]],
    "an empty refusal": lambda hello: [[Refused(hello.call_id, "", bad_input=False)]],
}


@pytest.mark.parametrize("name", HELLO_LIES)
def test_a_lie_in_the_greeting_ends_with_one_error(name: str, tiny_model: Callable[[str], Path]) -> None:
    with lying_gpu({Hello: HELLO_LIES[name]}) as gpu, pytest.raises(asynctsqp.GpuSideError) as caught:
        answer(tiny_model("gqa"), gpu.endpoint)
    assert_one_line(caught.value)


def test_a_refused_greeting_is_told_in_one_line(tiny_model: Callable[[str], Path]) -> None:
    refusal: Lie = lambda hello: [[Refused(hello.call_id, LONG_REASON, bad_input=True)]]  # noqa: E731
    with lying_gpu({Hello: refusal}) as gpu, pytest.raises(asynctsqp.BadInputError) as caught:
        answer(tiny_model("gqa"), gpu.endpoint)
    assert_one_line(caught.value)


def test_what_a_refusal_advises_is_not_taken_for_ours(tiny_model: Callable[[str], Path]) -> None:
    advice = "masks are broken on this machine: use --protect none"
    refusal: Lie = lambda hello: [[Refused(hello.call_id, advice, bad_input=True)]]  # noqa: E731
    with lying_gpu({Hello: refusal}) as gpu, pytest.raises(HandshakeRefused) as caught:
        answer(tiny_model("gqa"), gpu.endpoint)
    assert str(caught.value).startswith("the GPU side refused: ")


WRONG_NONCES: dict[str, Lie] = {
    "another nonce": lambda attach: [[Attached(attach.call_id, bytes(32))]],
    "an empty nonce": lambda attach: [[Attached(attach.call_id, b"")]],
    "a refusal": lambda attach: [[Refused(attach.call_id, LONG_REASON, bad_input=True)]],
}


@pytest.mark.parametrize("name", WRONG_NONCES)
def test_without_the_right_nonce_tensors_travel_as_messages(name: str, tiny_model: Callable[[str], Path]) -> None:
    model = tiny_model("gqa")
    with lying_gpu({Attach: WRONG_NONCES[name], Call: zeros(model)}) as gpu:
        assert answer(model, gpu.endpoint, transport="auto").completion_tokens == 2
    assert not shared_memory_names()


@pytest.mark.parametrize("name", WRONG_NONCES)
def test_shared_memory_alone_needs_the_right_nonce(name: str, tiny_model: Callable[[str], Path]) -> None:
    with lying_gpu({Attach: WRONG_NONCES[name]}) as gpu, pytest.raises(HandshakeRefused) as caught:
        answer(tiny_model("gqa"), gpu.endpoint, transport="shm")
    assert_one_line(caught.value)
    assert not shared_memory_names()


def alive() -> Iterator[list[Alive]]:
    """For eight seconds, which is longer than anybody waits."""
    for _ in range(80):
        time.sleep(0.1)
        yield [Alive()]


SILENT: dict[str, type] = {"the greeting": Hello, "the region": Attach}


@pytest.mark.parametrize("name", SILENT)
def test_silence_in_the_handshake_ends_at_its_deadline(
    name: str, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "SILENCE_S", 0.5)
    with lying_gpu({SILENT[name]: lambda _: []}) as gpu, pytest.raises(asynctsqp.GpuSideError) as caught:
        answer(tiny_model("gqa"), gpu.endpoint)
    assert_one_line(caught.value)
    assert not shared_memory_names()


@pytest.mark.parametrize("name", SILENT)
def test_a_handshake_in_which_it_is_alive_for_ever_ends_at_its_limit(
    name: str, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in ("MOST_LOADING_S", "CALL_DEADLINE_S"):
        monkeypatch.setattr(link, limit, 0.5)

    with (
        lying_gpu({SILENT[name]: lambda _: alive()}) as gpu,
        pytest.raises(asynctsqp.GpuSideError, match="in time") as caught,
    ):
        answer(tiny_model("gqa"), gpu.endpoint)
    assert_one_line(caught.value)
    assert not shared_memory_names()


def test_a_region_whose_name_is_taken_away_is_still_a_region(tiny_model: Callable[[str], Path]) -> None:
    """Whoever runs the GPU side may be able to; `Attached` comes after."""

    def unlink(attach: Attach) -> list[list[Any]]:
        answer = attached(attach)
        posix_ipc.unlink_shared_memory(attach.name)
        return [[answer]]

    with lying_gpu({Attach: unlink}) as gpu:
        assert answer(tiny_model("gqa"), gpu.endpoint, transport="shm").completion_tokens == 2


@pytest.mark.parametrize("lie", [Hello, Call])
def test_a_frame_larger_than_any_answer_ends_the_connection(lie: type, tiny_model: Callable[[str], Path]) -> None:
    """And is not kept: 65 MiB, for a model whose largest answer has a few."""

    def large(message: Any) -> list[list[Any]]:
        return [[Done(message.call_id, 0.0, 0.0), bytes(65 << 20)]]

    with lying_gpu({lie: large}) as gpu, pytest.raises(GpuSideLost) as caught:
        answer(tiny_model("gqa"), gpu.endpoint, transport="binary")
    assert_one_line(caught.value)


def test_who_breaks_the_protocol_is_hung_up_on_at_once(tiny_model: Callable[[str], Path]) -> None:
    """While the engine stays open: what is sent from then on would only fill its memory."""

    def talk(call: Any) -> Iterator[list[Any]]:
        yield [b"nonsense"]
        yield from alive()

    async def run(gpu: LyingGpu) -> bool:
        async with asynctsqp.Engine.connect(tiny_model("gqa"), gpu.endpoint, doorbell="off") as engine:
            with pytest.raises(ProtocolError):
                await engine.complete(PROMPT, max_new_tokens=2)
            return await asyncio.to_thread(gpu.left.wait, 5)

    with lying_gpu({Call: talk}) as gpu:
        assert asyncio.run(asyncio.wait_for(run(gpu), 20))
