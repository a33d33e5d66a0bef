"""benchmarks.compression: its proxy, its arithmetic, and what it prints. Its times are nobody's business here."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from asynctsqp.compression import LEAST_BYTES, Compression
from asynctsqp.model_spec import Op
from benchmarks import compression_codecs
from benchmarks.compression import main
from benchmarks.compression_codecs import Cost
from benchmarks.compression_links import LIMITS, crossover
from benchmarks.compression_recorder import FROM_GPU, TO_GPU, Payload
from benchmarks.harness import Worker
from benchmarks.throttle import Limit, Pacer
from tests.processes import gone, wait_until

COMMAND = [sys.executable, "-m", "benchmarks.compression"]
TOKENS = 12
TIMEOUT_S = 20
LINEARS = ["QKV", "O", "GATE_UP", "DOWN", "LM_HEAD"]


@pytest.fixture
def proxy() -> Iterator[Worker]:
    with Worker("the proxy", "benchmarks.throttle", {}) as worker:
        yield worker


@pytest.fixture
def ends(proxy: Worker) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a connection through the proxy."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(TIMEOUT_S)
        port = proxy.ask("open", port=listener.getsockname()[1])["port"]
        with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as near:
            far, _ = listener.accept()
            with far:
                far.settimeout(TIMEOUT_S)
                yield near, far


def receive(end: socket.socket, count: int) -> bytes:
    """So many bytes, or fewer if the other end closes."""
    received = b""
    while piece := end.recv(count - len(received)):
        received += piece
    return received


@pytest.mark.parametrize("bits_per_s", [None, 5e7, 2e9])
def test_the_proxy_changes_no_byte_either_way(
    proxy: Worker, ends: tuple[socket.socket, socket.socket], bits_per_s: float | None
) -> None:
    proxy.ask("limit", bits_per_s=bits_per_s)
    sent = [random.Random(seed).randbytes(3_000_001) for seed in (1, 2)]
    senders = [threading.Thread(target=end.sendall, args=(data,)) for end, data in zip(ends, sent, strict=True)]
    for sender in senders:
        sender.start()
    assert [receive(end, len(sent[0])) for end in reversed(ends)] == sent
    for sender in senders:
        sender.join()


def test_an_end_that_has_said_all_still_hears_the_other(ends: tuple[socket.socket, socket.socket]) -> None:
    near, far = ends
    near.sendall(b"question")
    near.shutdown(socket.SHUT_WR)
    assert receive(far, 100) == b"question"
    far.sendall(b"answer")
    far.shutdown(socket.SHUT_WR)
    assert receive(near, 100) == b"answer"


def test_a_target_that_refuses_ends_that_connection_only(
    proxy: Worker, ends: tuple[socket.socket, socket.socket]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed = listener.getsockname()[1]
    port = proxy.ask("open", port=closed)["port"]
    with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as refused:
        assert refused.recv(1) == b""
    ends[0].sendall(b"still there")
    assert receive(ends[1], 11) == b"still there"


def test_the_proxy_ends_with_its_driver_and_closes_what_it_holds() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(TIMEOUT_S)
        with Worker("the proxy", "benchmarks.throttle", {}) as worker:
            port = worker.ask("open", port=listener.getsockname()[1])["port"]
            near = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
            far, _ = listener.accept()
        with near, far:
            assert near.recv(1) == b""
            assert far.recv(1) == b""


def test_bytes_are_due_at_the_rate_and_lateness_is_made_up() -> None:
    """At 1000 bytes/s, with a clock written down by hand."""
    limit = Limit()
    pacer = Pacer(limit)
    assert pacer.wait_s(100, 50.0) == 0
    limit.bytes_per_s = 1000
    assert pacer.wait_s(100, 50.0) == pytest.approx(0.1)
    assert pacer.wait_s(100, 50.05) == pytest.approx(0.15)  # the second waits for the first
    assert pacer.wait_s(100, 50.203) == pytest.approx(0.097)  # 3 ms late
    assert pacer.wait_s(100, 60.0) == pytest.approx(0.1)  # nothing was saved up meanwhile


def test_the_breakeven_is_where_both_ways_take_as_long() -> None:
    cost = Cost(raw=8e6, packed=6e6, pack_s=0.015, unpack_s=0.005)
    bits = cost.breakeven_bits_per_s
    assert bits is not None
    assert 8 * cost.raw / bits == pytest.approx(8 * cost.packed / bits + 0.02)
    assert Cost(8e6, 8e6, 0.015, 0.0).breakeven_bits_per_s is None
    assert Cost(8e6, 8e6, 0.0, 0.0).figures() == {"ratio": 1, "breakeven_gbit_s": None}


def test_a_row_is_a_whole_pass_of_the_product_s_own_compression() -> None:
    large, small = memoryview(bytes(range(256)) * (LEAST_BYTES >> 7)), memoryview(bytes(LEAST_BYTES))
    payloads = [Payload(Op.QKV, TO_GPU, large, 5.0), Payload(Op.QKV, TO_GPU, large, 5.0)]
    rows = compression_codecs.measure([*payloads, Payload(Op.QKV, FROM_GPU, small, 5.0)], 4)
    assert [(row["direction"], row["bytes"], row["compressed"]) for row in rows] == [
        (TO_GPU, 10 * large.nbytes, True),
        (FROM_GPU, 5 * small.nbytes, False),
    ]
    for codec in compression_codecs.CODECS:
        packed = len(Compression(codec).pack(large, 4))
        assert rows[0]["codecs"][codec]["ratio"] == pytest.approx(large.nbytes / packed)
        whole = compression_codecs.prefill(rows)["codecs"][codec]
        assert whole["ratio"] == pytest.approx(
            (10 * large.nbytes + 5 * small.nbytes) / (10 * packed + 5 * small.nbytes)
        )


def test_what_is_compressed_in_vain_costs_its_sender_only() -> None:
    noise = memoryview(random.Random(0).randbytes(LEAST_BYTES + 4))
    (row,) = compression_codecs.measure([Payload(Op.QKV, TO_GPU, noise, 1.0)], 4)
    for codec in compression_codecs.CODECS:
        assert row["costs"][codec]["pack_s"] > 0
        assert row["costs"][codec]["unpack_s"] == 0
        assert row["codecs"][codec] | {"pack_mb_s": None} == {
            "ratio": 1,
            "pack_mb_s": None,
            "unpack_mb_s": None,
            "breakeven_gbit_s": None,
        }


def link(bits_per_s: float, none_s: float, lz4_s: float) -> dict[str, Any]:
    interval = {"low": lz4_s / none_s, "high": lz4_s / none_s}
    return {
        "plain_bits_per_s": {"there": bits_per_s, "back": bits_per_s},
        "prefill_s": {"none": none_s, "lz4": lz4_s},
        "against_none": {"lz4": {"interval": interval}},
    }


def test_the_crossover_of_two_straight_lines_is_found() -> None:
    """8 Gbit against 6 Gbit and 5 s: the same on 0.4 Gbit/s."""
    links = [link(rate, 8e9 / rate, 6e9 / rate + 5) for rate in (1e9, 1e8, 3e8)]
    assert crossover(links, "lz4") == {"pays": "below", "gbit_s": pytest.approx(0.4), "rounds_agree": True}
    assert crossover([links[1], links[2]], "lz4") == {"pays": "always", "gbit_s": None, "rounds_agree": True}
    assert crossover([links[0]], "lz4") == {"pays": "never", "gbit_s": None, "rounds_agree": True}
    links[0]["against_none"]["lz4"]["interval"]["low"] = 0.99
    assert not crossover(links, "lz4")["rounds_agree"]


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Path:
    """With slots that hold enough scores to be compressed."""
    return tiny_model("1-layers")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[str, dict[str, Any]]:
    """Standard output of a short run, and the file that it wrote."""
    out = tmp_path_factory.mktemp("compression") / "out.json"
    options = ["--model", str(model), "--rounds", "1", "--out", str(out)]
    options += ["--tokens", str(TOKENS), "--link-tokens", str(TOKENS)]
    done = subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == ""
    return done.stdout, json.loads(out.read_text())


def test_the_last_line_is_the_json(made: tuple[str, dict[str, Any]]) -> None:
    stdout, report = made
    assert json.loads(stdout.splitlines()[-1]) == report
    assert report["benchmark"] == "compression"
    assert report["settings"]["tokens"] == TOKENS
    assert report["machine"]["cores_used"] >= 1


def test_every_operation_is_there_both_ways_in_every_dtype(made: tuple[str, dict[str, Any]]) -> None:
    recorded = made[1]["results"]["activations"]
    expected = [(op, direction) for op in [*LINEARS, "QK", "AV"] for direction in (TO_GPU, FROM_GPU)]
    for dtype, itemsize in (("float32", 4), ("bfloat16", 2), ("float16", 2)):
        rows = recorded[dtype]
        assert [(row["op"], row["direction"]) for row in rows] == expected
        assert rows[0]["bytes"] == TOKENS * 64 * itemsize  # of the one layer
        assert all(found["ratio"] >= 1 for row in rows for found in row["codecs"].values())
    scores = recorded["float32"][LINEARS.index("LM_HEAD") * 2 + 1]
    assert scores["compressed"]  # two blocks of 6 x 49152 x 4 bytes
    assert scores["codecs"]["zstd"]["ratio"] > 1
    assert scores["codecs"]["zstd"]["pack_mb_s"] > 0


def test_every_link_is_measured_in_every_way(made: tuple[str, dict[str, Any]]) -> None:
    for result in made[1]["results"]["links"].values():
        assert [found["limit"] for found in result["links"]] == list(LIMITS)
        for found in result["links"]:
            assert found["samples_s"].keys() == {"none", "lz4", "zstd"}
            assert all(len(samples) == 1 for samples in found["samples_s"].values())
            assert all(rate > 0 for rate in found["plain_bits_per_s"].values())
        assert result["computed"]["codecs"]["lz4"]["ratio"] == 1  # nothing of a tiny prefill is compressed
        assert result["crossover"].keys() == {"lz4", "zstd"}


def test_nothing_outlives_a_run_that_is_killed(model: Path) -> None:
    options = ["--model", str(model), "--rounds", "100000", "--tokens", "8", "--link-tokens", "8"]
    process = subprocess.Popen([*COMMAND, *options], stdout=subprocess.DEVNULL)
    try:
        children = f"/proc/{process.pid}/task/{process.pid}/children"
        assert wait_until(lambda: len(Path(children).read_text().split()) == 3, 60)
        started = [int(pid) for pid in Path(children).read_text().split()]
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert wait_until(lambda: all(gone(pid) for pid in started), 30)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--rounds", "0"], "--rounds"),
        (["--tokens", "0"], "--tokens"),
        (["--link-tokens", "4096"], "context"),
        (["--model", "/nowhere"], "/nowhere"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(
    options: list[str], word: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(model), *options]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert word in said.err
    assert said.err.count("\n") == 1
