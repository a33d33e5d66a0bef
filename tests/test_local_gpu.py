"""A GPU side of one's own: it comes up beside the imports of the command that started it, and goes with it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from asynctsqp.config import EngineOptions
from asynctsqp.errors import BadInputError, EngineClosed
from tee_side.local_gpu import LocalGpuSide
from tests.processes import ROOT, gone, tee_process


def local_gpu_sides() -> list[int]:
    """Of this process; other tests' GPU sides, which they share, are started without --local."""
    return [child.pid for child in psutil.Process().children() if "--local" in child.cmdline()]


def test_a_command_starts_it_before_what_takes_seconds() -> None:
    code = "import sys, asynctsqp.tee, tee_side.local_gpu; print({'torch', 'transformers', 'zmq'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr


def test_the_one_that_a_command_started_early_is_the_one_it_asks(tiny_model: Callable[[str], Path]) -> None:
    flags = ("--prompt", "Once", "--max-new-tokens", "400", "--temperature", "0", "--ignore-eos")
    with tee_process("--model", str(tiny_model("gqa")), *flags) as tee:
        early = tee.wait_for_local_gpu()
        tee.wait_for_text()
        assert [child.pid for child in psutil.Process(tee.pid).children()] == [early]


def test_it_starts_once(private_tmp: Path, tiny_model: Callable[[str], Path]) -> None:
    local = LocalGpuSide(str(tiny_model("gqa")), EngineOptions())
    try:
        local.start()
        (pid,) = local_gpu_sides()
        local.start()
        endpoint = local.endpoint()
        assert local.endpoint() == endpoint
        assert local_gpu_sides() == [pid]
        assert Path(endpoint.removeprefix("ipc://")).is_socket()
    finally:
        local.stop()
    assert gone(pid)
    assert not list(private_tmp.glob("asynctsqp-*"))


def test_it_stops_in_the_middle_of_its_start(private_tmp: Path, tiny_model: Callable[[str], Path]) -> None:
    local = LocalGpuSide(str(tiny_model("gqa")), EngineOptions())
    try:
        local.start()
        (pid,) = local_gpu_sides()
    finally:
        local.stop()
    assert gone(pid)
    assert not list(private_tmp.glob("asynctsqp-*"))
    local.start()
    assert not local_gpu_sides(), "it was stopped for good"
    with pytest.raises(EngineClosed):
        local.endpoint()


def test_why_it_did_not_come_up(tmp_path: Path) -> None:
    local = LocalGpuSide(str(tmp_path), EngineOptions())
    try:
        local.start()
        with pytest.raises(BadInputError, match=r"config\.json"):
            local.endpoint()
        assert not local_gpu_sides()
    finally:
        local.stop()
