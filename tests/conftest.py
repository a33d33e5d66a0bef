"""Shared by all tests: models, real GPU side processes, and a watch for what a test leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests import models

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """SmolLM2-135M-Instruct as `make demo` prepares it."""
    from benchmarks.demo_model import prepare

    return prepare(ROOT / "models" / "smollm2-135m-instruct")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Callable[[str], Path]:
    """name of models.TINY -> a directory with that random model, made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = models.save_tiny(tmp_path_factory.mktemp(name), name, tokenizer_from=demo_model)
        return made[name]

    return get


class GpuProcess:
    """A real `python -m asynctsqp.gpu`."""

    def __init__(self, model: Path, *flags: str) -> None:
        command = [sys.executable, "-m", "asynctsqp.gpu", "--model", str(model), "--threads", "1", *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True)
        assert self.process.stdout is not None
        word, _, self.endpoint = self.process.stdout.readline().strip().partition(" ")
        assert word == "listening", f"the GPU side said {word!r}"

    def resident_bytes(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def kill(self) -> None:
        """As `kill -9`."""
        self.process.kill()
        self.stop()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)
        if self.process.stdout is not None:
            self.process.stdout.close()


@pytest.fixture
def start_gpu() -> Iterator[Callable[..., GpuProcess]]:
    """start_gpu(model, *flags) -> GpuProcess on a free TCP port unless --bind says otherwise."""
    started: list[GpuProcess] = []

    def start(model: Path, *flags: str) -> GpuProcess:
        where = () if "--bind" in flags else ("--bind", "tcp://127.0.0.1:0")
        started.append(GpuProcess(model, *where, *flags))
        return started[-1]

    yield start
    for process in started:
        process.stop()


def run_tee(*flags: str, stdin: str = "", timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """`python -m asynctsqp.tee FLAGS`, to its end."""
    command = [sys.executable, "-m", "asynctsqp.tee", *flags]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, cwd=ROOT, timeout=timeout_s)


def _leftovers() -> set[str]:
    shared = {f"/dev/shm/{name}" for name in os.listdir("/dev/shm") if "asynctsqp" in name}
    private = {f"/tmp/{name}" for name in os.listdir("/tmp") if name.startswith("asynctsqp-")}
    children = {
        f"process {child.pid}: {' '.join(child.cmdline())[:80]}"
        for child in psutil.Process().children(recursive=True)
        if child.status() != psutil.STATUS_ZOMBIE and "asynctsqp" in " ".join(child.cmdline())
    }
    return shared | private | children


@pytest.fixture(autouse=True)
def leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test leaves /dev/shm, /tmp and the process table as it found them."""
    before = _leftovers()
    yield
    left = _leftovers() - before
    assert not left, f"the test left behind: {sorted(left)}"
