"""Where the two sides meet, or do not: nobody there, somebody else, a port in use."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asynctsqp.checkpoint import Checkpoint, short
from tests.conftest import GpuProcess
from tests.processes import ROOT, Ended, assert_one_error, run_gpu, run_tee

PROMPT = ("--prompt", "Once upon a time", "--max-new-tokens", "2", "--temperature", "0")


@pytest.fixture
def silent_port() -> Iterator[str]:
    """An address where nobody listens."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield f"tcp://127.0.0.1:{reserved.getsockname()[1]}"


def test_no_gpu_side_at_the_address(silent_port: str, tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    for endpoint in (silent_port, f"ipc://{tmp_path}/nothing.sock", "tcp://no-such-host.invalid:5555"):
        flags = ("--model", str(tiny_model("gqa")), "--gpu", endpoint)
        assert_one_error(run_tee(*flags, *PROMPT), 3, endpoint)


def test_something_else_at_the_address(tiny_model: Callable[[str], Path]) -> None:
    """It accepts and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        assert_one_error(run_tee("--model", str(tiny_model("gqa")), "--gpu", endpoint, *PROMPT), 3, endpoint)


def test_another_model_on_the_other_side(tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]) -> None:
    shorts = [short(Checkpoint(tiny_model(name)).fingerprint()) for name in ("gqa", "biases")]
    flags = ("--model", str(tiny_model("biases")), "--gpu", tiny_gpu.endpoint)
    assert_one_error(run_tee(*flags, *PROMPT), 2, *shorts)


GPU_NONSENSE: list[tuple[str, ...]] = [
    ("--bind", "nonsense"),
    ("--bind", ""),
    ("--bind", "tcp://"),
    ("--bind", "tcp://127.0.0.1"),
    ("--bind", "tcp://127.0.0.1:port"),
    ("--bind", "tcp://127.0.0.1:99999"),
    ("--bind", "tcp://192.0.2.1:5555"),
    ("--bind", "http://127.0.0.1:0"),
    ("--bind", "inproc://gpu"),
    ("--bind", "ipc:///no/such/directory/gpu.sock"),
    ("--bind", "ipc://" + "a" * 200),
    ("--bind", "ipc:///etc/passwd"),
    ("--device", "abacus"),
    ("--device", "cuda:99"),
    ("--device", "meta"),
    ("--dtype", "int8"),
    ("--threads", "0"),
    ("--threads", "99999999"),
    ("--no-such-flag",),
]


@pytest.mark.parametrize("flags", GPU_NONSENSE, ids=lambda flags: " ".join(flags)[:40])
def test_a_gpu_side_that_cannot_start(flags: tuple[str, ...], tiny_model: Callable[[str], Path]) -> None:
    where = () if "--bind" in flags else ("--bind", "tcp://127.0.0.1:0")
    assert_one_error(run_gpu("--model", str(tiny_model("gqa")), *where, *flags), 2, program="asynctsqp.gpu")


def test_a_port_in_use(tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]) -> None:
    command = [sys.executable, "-m", "asynctsqp.gpu", "--model", str(tiny_model("gqa")), "--bind", tiny_gpu.endpoint]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    ended = Ended(done.returncode, done.stdout, done.stderr)
    assert_one_error(ended, 2, "in use", tiny_gpu.endpoint, program="asynctsqp.gpu")


def test_a_socket_of_another_kind_in_use(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    path = tmp_path / "other.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        ended = run_gpu("--model", str(tiny_model("gqa")), "--bind", f"ipc://{path}")
        assert_one_error(ended, 2, "cannot listen", "in use", program="asynctsqp.gpu")
        assert path.is_socket(), "it was taken away"


def test_a_socket_in_use(
    tmp_path: Path, tiny_model: Callable[[str], Path], start_gpu: Callable[..., GpuProcess]
) -> None:
    model, endpoint = tiny_model("gqa"), f"ipc://{tmp_path}/gpu.sock"
    start_gpu(model, "--bind", endpoint)
    command = [sys.executable, "-m", "asynctsqp.gpu", "--model", str(model), "--bind", endpoint]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10, check=False)
    except subprocess.TimeoutExpired:
        pytest.fail("the second GPU side took the first one's address away")
    assert_one_error(Ended(done.returncode, done.stdout, done.stderr), 2, "in use", program="asynctsqp.gpu")


def test_a_socket_that_a_killed_gpu_side_left_is_no_obstacle(
    tmp_path: Path, tiny_model: Callable[[str], Path], start_gpu: Callable[..., GpuProcess]
) -> None:
    model, endpoint = tiny_model("gqa"), f"ipc://{tmp_path}/gpu.sock"
    start_gpu(model, "--bind", endpoint).kill()
    assert start_gpu(model, "--bind", endpoint).endpoint == endpoint
