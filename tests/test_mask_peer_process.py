"""The mask peer as a process: its key file, its one role, and what it does with requests that nobody honest sends."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.endpoints import same_host
from asynctsqp.integer_weights import digest_of, fingerprint, matrices, read
from asynctsqp.key_stream import MOST_BLOCKS
from asynctsqp.limits import MASK_BLOCK_BYTES
from asynctsqp.messages import PROTOCOL_VERSION, Attach, Call, Hello, MaskCall, MaskHello
from asynctsqp.model_spec import Op
from gpu_side.mask_server import MOST_UNREAD_BYTES
from gpu_side.secret_file import public_key, secret_key
from tests.clients import DONE, REFUSED, WELCOME
from tests.conftest import GpuProcess, MaskPeerProcess
from tests.mask_peers import CPU, TrueProducts, raw_mask_client
from tests.processes import assert_one_error, run_gpu, run_tee, until_idle

KEY = bytes(range(32))
PUBLIC = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"


@pytest.fixture(scope="module")
def hello(tiny_model: Callable[[str], Path]) -> MaskHello:
    checkpoint = Checkpoint(tiny_model("gqa"))
    weights = fingerprint(digest_of(read(checkpoint, matrix, 8, CPU)) for matrix in matrices(checkpoint.spec))
    return MaskHello(0, PROTOCOL_VERSION, checkpoint.fingerprint(), 8, weights, KEY)


def fields(answer: list[bytes] | None) -> list[Any]:
    assert answer is not None, "no answer came"
    decoded: list[Any] = msgspec.msgpack.decode(answer[0])
    return decoded


def test_it_gives_right_products(
    tiny_mask_peer: MaskPeerProcess, hello: MaskHello, tiny_model: Callable[[str], Path]
) -> None:
    products = TrueProducts(tiny_model("gqa"))
    with raw_mask_client(tiny_mask_peer.endpoint, tiny_mask_peer.key) as client:
        assert fields(client.ask(hello))[0] == WELCOME
        for number, (op, layer, address, rows) in enumerate(
            [(Op.QKV, 0, 0, 1), (Op.DOWN, 2, 10**15, 100), (Op.LM_HEAD, 0, MOST_BLOCKS - 16 * 7, 7)]
        ):
            call = MaskCall(number, op, layer, address, rows)
            answer = client.ask(call)
            assert fields(answer)[:2] == [DONE, number]
            assert answer is not None
            assert np.array_equal(np.frombuffer(answer[1], np.int32).reshape(rows, -1), products.of(KEY, call))


BAD_CALLS = {
    "an operation that there is not": MaskCall(1, 99, 0, 0, 1),
    "one that is no linear": MaskCall(1, Op.QK, 0, 0, 1),
    "a part of a linear": MaskCall(1, Op.Q, 0, 0, 1),
    "a layer that there is not": MaskCall(1, Op.QKV, 3, 0, 1),
    "a layer before the first": MaskCall(1, Op.QKV, -1, 0, 1),
    "no rows": MaskCall(1, Op.QKV, 0, 0, 0),
    "fewer": MaskCall(1, Op.QKV, 0, 0, -5),
    "too many rows": MaskCall(1, Op.LM_HEAD, 0, 0, MASK_BLOCK_BYTES // (4 * 49152) + 1),
    "far too many": MaskCall(1, Op.QKV, 0, 0, 1 << 62),
    "an address before the first": MaskCall(1, Op.QKV, 0, -1, 1),
    "an address behind the last": MaskCall(1, Op.QKV, 0, MOST_BLOCKS, 1),
    "rows that reach behind it": MaskCall(1, Op.QKV, 0, MOST_BLOCKS - 1, 1),
    "an ordinary call": Call(1, Op.QKV, 0, 1, 0, 0, 0),
    "a region": Attach(1, "/asynctsqp-x", 1, 2, 4096, False),
    "a second greeting of the other kind": Hello(1, PROTOCOL_VERSION, b"", "float32", "shielded", "none"),
    "nonsense": b"\xc1\xff",
    "an address of too many bytes": b"\x95\x06\x01\x00\x00\xcf\xff\xff\xff\xff\xff\xff\xff\xff\x01",
}


@pytest.mark.parametrize("bad", BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_bad_request_is_refused_and_harms_nobody(
    bad: bytes | msgspec.Struct, tiny_mask_peer: MaskPeerProcess, hello: MaskHello
) -> None:
    with raw_mask_client(tiny_mask_peer.endpoint, tiny_mask_peer.key) as client:
        assert fields(client.ask(hello))[0] == WELCOME
        assert fields(client.ask(bad))[0] == REFUSED
        assert fields(client.ask(MaskCall(2, Op.QKV, 0, 0, 1)))[:2] == [DONE, 2]
    assert tiny_mask_peer.process.poll() is None


def test_bad_greetings(tiny_mask_peer: MaskPeerProcess, hello: MaskHello) -> None:
    changes: list[dict[str, Any]] = [
        {"version": 99},
        {"fingerprint": b"another"},
        {"weight_bits": 0},
        {"weight_bits": 9},
        {"weights": b"other"},
        {"key": b""},
        {"key": bytes(31)},
        {"key": bytes(33)},
    ]
    with raw_mask_client(tiny_mask_peer.endpoint, tiny_mask_peer.key) as client:
        assert fields(client.ask(MaskCall(1, Op.QKV, 0, 0, 1)))[0] == REFUSED, "not greeted yet"
        for change in changes:
            assert fields(client.ask(msgspec.structs.replace(hello, **change)))[0] == REFUSED, change
        assert fields(client.ask(hello))[0] == WELCOME
        assert fields(client.ask(hello))[0] == REFUSED, "twice"


def test_nobody_without_the_key_is_heard(tiny_mask_peer: MaskPeerProcess, hello: MaskHello) -> None:
    public, _ = zmq.curve_keypair()
    for key in (None, public.decode()):
        with raw_mask_client(tiny_mask_peer.endpoint, key) as client:
            assert client.ask(hello, timeout_ms=500) is None


def test_a_frame_that_is_too_large_ends_the_connection(tiny_mask_peer: MaskPeerProcess, hello: MaskHello) -> None:
    with raw_mask_client(tiny_mask_peer.endpoint, tiny_mask_peer.key) as client:
        assert fields(client.ask(hello))[0] == WELCOME
        assert client.ask(bytes(1 << 16), timeout_ms=300) is None
    assert tiny_mask_peer.process.poll() is None


def test_a_gpu_side_makes_no_masks(tiny_gpu: GpuProcess, hello: MaskHello) -> None:
    with raw_mask_client(tiny_gpu.endpoint, None) as client:
        for request in (hello, MaskCall(0, Op.QKV, 0, 0, 1)):
            answer = fields(client.ask(request))
            assert answer[0] == REFUSED
            assert "no mask peer" in answer[2]


def test_a_key_is_made_once_and_only_for_its_owner(tmp_path: Path) -> None:
    file, mask = tmp_path / "key", os.umask(0)
    try:
        secret = secret_key(file)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert secret_key(file) == secret
    assert public_key(secret) == zmq.curve_public(secret).decode()
    assert secret_key(tmp_path / "other") != secret


def make(file: Path, content: bytes, mode: int) -> str:
    file.write_bytes(content)
    file.chmod(mode)
    return str(file)


def test_a_key_that_cannot_be_used_is_told(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    good = b"D:)Q[IlAW!ahhC2ac:9*A}h:p?([4%wOTJ%JR%cs"
    bad = {
        make(tmp_path / "all may read", good, 0o644): "others can read",
        make(tmp_path / "the group may read", good, 0o640): "others can read",
        make(tmp_path / "empty", b"", 0o600): "holds no key",
        make(tmp_path / "too short", good[:-1], 0o600): "holds no key",
        make(tmp_path / "too long", good + b"x", 0o600): "holds no key",
        str(tmp_path): "",
        str(tmp_path / "missing" / "key"): "No such file",
        "/dev/null": "is not a file",
    }
    for file, words in bad.items():
        ended = run_gpu("--model", str(tiny_model("gqa")), "--mask-peer-secret", file)
        assert_one_error(ended, 2, "--mask-peer-secret", words, program="asynctsqp.gpu")


@pytest.mark.parametrize(
    "flags", [("--bind", "ipc:///tmp/peer.sock"), ("--local", "/tmp/peer"), ("--dtype", "float32")], ids=str
)
def test_flags_that_are_not_a_mask_peers(flags: tuple[str, ...], tmp_path: Path) -> None:
    ended = run_gpu("--model", "x/y", "--mask-peer-secret", str(tmp_path / "key"), *flags)
    assert_one_error(ended, 2, "mask peer", program="asynctsqp.gpu")
    assert not (tmp_path / "key").exists()


FULL = ("--protect", "full")
PEER, KEY_FLAG = ("--mask-peer", "tcp://10.0.0.7:5556"), ("--mask-peer-key", PUBLIC)
BAD_FLAGS = [
    (*FULL, *PEER),
    (*FULL, *KEY_FLAG),
    (*PEER, *KEY_FLAG),
    ("--protect", "verify", *PEER, *KEY_FLAG),
    (*FULL, *PEER, "--mask-peer-key", PUBLIC[:-1]),
    (*FULL, *PEER, "--mask-peer-key", PUBLIC[:-1] + '"'),
    (*FULL, "--mask-peer", "ipc:///tmp/peer.sock", *KEY_FLAG),
    (*FULL, "--mask-peer", "10.0.0.7:5556", *KEY_FLAG),
    (*FULL, "--mask-peer", "tcp://10.0.0.7:0", *KEY_FLAG),
    (*FULL, "--mask-peer", "tcp://10.0.0.7:*", *KEY_FLAG),
    (*FULL, *PEER, *KEY_FLAG, "--mask-memory", "1000"),
]
ONE_PARTY = [
    ("tcp://10.0.0.7:5556", "tcp://10.0.0.7:5556"),
    ("tcp://10.0.0.7:05556", "tcp://10.0.0.7:5556"),
    ("tcp://GPU.example.:5556", "tcp://gpu.example:5556"),
    ("tcp://localhost:5556", "tcp://127.0.0.1:5556"),
    ("tcp://127.0.0.1:5556", "tcp://[::1]:5556"),
    ("tcp://127.1:5556", "tcp://127.9.9.9:5556"),
    ("tcp://0.0.0.0:5556", "tcp://localhost:5556"),
    ("tcp://[::ffff:10.0.0.7]:5556", "tcp://10.0.0.7:5556"),
    ("tcp://[2001:db8:0::7]:5556", "tcp://[2001:DB8::7]:5556"),
]


@pytest.mark.parametrize("flags", BAD_FLAGS, ids=str)
def test_flags_that_make_no_sense(flags: tuple[str, ...], tiny_model: Callable[[str], Path]) -> None:
    assert_one_error(run_tee("--model", str(tiny_model("gqa")), "--prompt", "Hi", *flags), 2, "--mask-")


@pytest.mark.parametrize(("gpu", "peer"), ONE_PARTY)
def test_one_endpoint_is_no_two_parties(gpu: str, peer: str, tiny_model: Callable[[str], Path]) -> None:
    flags = ("--gpu", gpu, "--mask-peer", peer, *KEY_FLAG)
    ended = run_tee("--model", str(tiny_model("gqa")), "--prompt", "Hi", *FULL, *flags)
    assert_one_error(ended, 2, "same endpoint")


@pytest.mark.parametrize(
    ("gpu", "peer", "one"),
    [
        (None, "tcp://127.0.0.1:1", True),
        (None, "tcp://10.0.0.7:1", False),
        ("ipc:///tmp/gpu.sock", "tcp://localhost:1", True),
        ("tcp://10.0.0.7:2", "tcp://10.0.0.7:1", True),
        ("tcp://10.0.0.8:2", "tcp://10.0.0.7:1", False),
        ("tcp://localhost:2", "tcp://[::1]:1", True),
    ],
)
def test_one_host_is_seen(gpu: str | None, peer: str, one: bool) -> None:
    assert same_host(gpu, peer) is one


def test_one_host_is_warned_of(
    tiny_gpu: GpuProcess, tiny_mask_peer: MaskPeerProcess, tiny_model: Callable[[str], Path]
) -> None:
    flags = ("--model", str(tiny_model("gqa")), "--gpu", tiny_gpu.endpoint, *FULL, *tiny_mask_peer.flags)
    ended = run_tee(*flags, "--prompt", "Hi", "--max-new-tokens", "1")
    assert ended.code == 0, ended.err
    assert ended.err.count("one host") == 1


def test_a_client_that_reads_hardly_anything_is_not_computed_for_without_end(
    tiny_mask_peer: MaskPeerProcess, hello: MaskHello
) -> None:
    calls, rows = 100, MASK_BLOCK_BYTES // (4 * 49152)
    with raw_mask_client(tiny_mask_peer.endpoint, tiny_mask_peer.key, most_unread=1) as client:
        assert fields(client.ask(hello))[0] == WELCOME
        for number in range(calls):
            client.send(MaskCall(number, Op.LM_HEAD, 0, 0, rows))
        answers: list[Any] = []
        until_idle(tiny_mask_peer.process.pid, meanwhile=lambda: answers.append(fields(client.answer())))
        read = MASK_BLOCK_BYTES * len(answers)
        answers += [fields(client.answer()) for _ in range(calls - len(answers))]
        refused = [answer for answer in answers if answer[0] == REFUSED]
        assert all("have not been read" in answer[2] for answer in refused)
        # what was unread, what was being made then, and what kernel and client had taken already
        made = MASK_BLOCK_BYTES * sum(answer[0] == DONE for answer in answers)
        print(f"{calls * MASK_BLOCK_BYTES >> 20} MiB asked for, {made >> 20} MiB made")
        assert MOST_UNREAD_BYTES <= made < MOST_UNREAD_BYTES + read + 48 * (1 << 20)
        assert len(refused) > 0
        assert fields(client.ask(MaskCall(calls, Op.LM_HEAD, 0, 0, 1)))[:2] == [DONE, calls], "once it reads again"
