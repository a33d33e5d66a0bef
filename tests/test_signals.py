"""Signals: both sides stop when asked, at any moment, with the exit code that says so."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from asynctsqp.model_spec import Op
from asynctsqp.shm import HEADER_BYTES
from tests.clients import ATTACHED, WELCOME, call, shared_memory
from tests.conftest import GpuProcess
from tests.peers import attach, raw_tee
from tests.processes import ROOT, TeeProcess, gone, shared_memory_names, tee_process, wait_until

FLAGS = ("--prompt", "Once upon a time", "--max-new-tokens", "440", "--temperature", "0", "--ignore-eos")
BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
SOON_S = 15.0  # a bound on hanging, on however slow a machine


def assert_interrupted(tee: TeeProcess, private_tmp: Path) -> None:
    ended = tee.end(SOON_S)
    assert ended.code == 130
    assert "Traceback" not in ended.err
    assert len(ended.errors) <= 1, ended.errors
    assert not shared_memory_names()
    assert not list(private_tmp.glob("asynctsqp-*"))


@BOTH
def test_an_interrupted_answer_leaves_nothing(
    number: int, private_tmp: Path, tiny_model: Callable[[str], Path]
) -> None:
    with tee_process("--model", str(tiny_model("gqa")), *FLAGS) as tee:
        tee.wait_for_text()
        local = tee.local_gpu().pid
        tee.signal(number)
        assert_interrupted(tee, private_tmp)
        assert gone(local)


@BOTH
def test_interrupted_while_the_gpu_side_starts(
    number: int, private_tmp: Path, tiny_model: Callable[[str], Path]
) -> None:
    with tee_process("--model", str(tiny_model("gqa")), *FLAGS) as tee:
        local = tee.wait_for_local_gpu()
        tee.signal(number)
        assert_interrupted(tee, private_tmp)
        assert gone(local)


@BOTH
def test_interrupted_while_it_waits_for_a_prompt(
    number: int, private_tmp: Path, tiny_model: Callable[[str], Path]
) -> None:
    """Standard input is a pipe into which nobody writes."""
    with tee_process("--model", str(tiny_model("gqa")), stdin=subprocess.PIPE) as tee:
        assert wait_until(lambda: idle(tee.pid), 20)
        tee.signal(number)
        assert_interrupted(tee, private_tmp)


@BOTH
def test_interrupted_within_a_library_that_keeps_exceptions(
    number: int, tmp_path: Path, private_tmp: Path, tiny_model: Callable[[str], Path]
) -> None:
    """As torch's and transformers' imports do at some moments, or end with a segmentation fault."""
    (tmp_path / "torch.py").write_text(
        "import time\nwhile True:\n    try:\n        time.sleep(60)\n    except BaseException:\n        pass\n"
    )
    with tee_process("--model", str(tiny_model("gqa")), *FLAGS, PYTHONPATH=str(tmp_path)) as tee:
        local = tee.wait_for_local_gpu()
        for pid in (tee.pid, local):
            assert wait_until(lambda pid=pid: idle(pid), 20)
        tee.signal(number)
        assert_interrupted(tee, private_tmp)
        assert gone(local)


def test_interrupted_while_modules_are_imported(private_tmp: Path, tiny_model: Callable[[str], Path]) -> None:
    with tee_process("--model", str(tiny_model("gqa")), *FLAGS) as tee:
        maps = Path(f"/proc/{tee.pid}/maps")
        assert wait_until(lambda: "libtorch_cpu" in maps.read_text(), 20), "torch is never imported?"
        tee.signal(signal.SIGINT)
        assert_interrupted(tee, private_tmp)


@BOTH
def test_a_gpu_side_stops_when_asked(
    number: int, tmp_path: Path, tiny_model: Callable[[str], Path], start_gpu: Callable[..., GpuProcess]
) -> None:
    path = tmp_path / "gpu.sock"
    gpu = start_gpu(tiny_model("gqa"), "--bind", f"ipc://{path}")
    gpu.process.send_signal(number)
    assert gpu.process.wait(SOON_S) == 0
    assert not path.exists(), "its socket is still there"


@BOTH
def test_a_busy_gpu_side_stops_when_asked(
    number: int, tiny_model: Callable[[str], Path], start_gpu: Callable[..., GpuProcess]
) -> None:
    model = tiny_model("gqa")
    gpu = start_gpu(model)
    with tee_process("--model", str(model), "--gpu", gpu.endpoint, *FLAGS) as tee:
        tee.wait_for_text()
        gpu.process.send_signal(number)
        assert gpu.process.wait(SOON_S) == 0
        assert tee.end(SOON_S).code == 3


@BOTH
def test_a_gpu_side_stops_in_the_middle_of_long_products(
    number: int, tiny_model: Callable[[str], Path], start_gpu: Callable[..., GpuProcess]
) -> None:
    """A thread computes in the client's region when the region is given back: half a second of work waits for it."""
    model, rows = tiny_model("gqa"), 256
    gpu = start_gpu(model)
    slot = rows * 49152 * 4
    with raw_tee(gpu.endpoint) as peer, shared_memory(HEADER_BYTES + 4 * slot) as region:
        assert peer.greet(model)[0] == WELCOME
        assert peer.ask(attach(1, region, 1, slot))[0][0] == ATTACHED
        for call_id in range(50):
            peer.send(call(call_id=call_id, op=Op.LM_HEAD, layer=0, rows=rows, slot=call_id % 2))
        peer.receive()
        gpu.process.send_signal(number)
        assert gpu.process.wait(SOON_S) == 0


@BOTH
def test_a_gpu_side_stops_while_it_loads(number: int, demo_model: Path) -> None:
    command = [sys.executable, "-m", "asynctsqp.gpu", "--model", str(demo_model), "--dtype", "float32"]
    pipe = subprocess.PIPE
    with subprocess.Popen([*command, "--bind", "tcp://127.0.0.1:0"], stdout=pipe, stderr=pipe, cwd=ROOT) as process:
        assert wait_until(lambda: reads(process.pid, "model.safetensors"), 20)
        process.send_signal(number)
        _out, err = process.communicate(timeout=SOON_S)
    assert process.returncode == 0
    assert b"Traceback" not in err


def reads(pid: int, name: str) -> bool:
    """Whether a process has a file of that name open."""
    return any(file.path.endswith(name) for file in psutil.Process(pid).open_files())


def idle(pid: int) -> bool:
    """Whether a process has done nothing for a while: it waits."""
    before = psutil.Process(pid).cpu_times()
    time.sleep(0.5)
    return psutil.Process(pid).cpu_times()[:2] == before[:2]
