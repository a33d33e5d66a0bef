"""Shared by all tests: models, real GPU side processes, and a watch for what a test leaves behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from asynctsqp import Engine
from tests import devices, models
from tests.clients import GoodTee
from tests.mask_peers import Introduced
from tests.meddling_gpu import MeddlingGpu, meddling_gpu
from tests.peers import raw_tee

ROOT = Path(__file__).parent.parent
SETTLE_S = 5.0  # a GPU side needs a moment to see that its parent was killed


def pytest_configure() -> None:
    """A shell's background ignores SIGINT, and every process under test would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    devices.hide()


@pytest.fixture(scope="session", autouse=True)
def private_tmp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Processes of this run keep their sockets here: other runs on this machine are no business of ours."""
    directory = tmp_path_factory.mktemp("tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(directory))
        patch.setattr(tempfile, "tempdir", None)
        yield directory


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """SmolLM2-135M-Instruct as `make demo` prepares it."""
    from benchmarks.demo_model import prepare

    return prepare(ROOT / "models" / "smollm2-135m-instruct")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Callable[[str], Path]:
    """name of models.TINY or TINY_DEPTHS -> a directory with that random model, made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = models.save_tiny(tmp_path_factory.mktemp(name), name, tokenizer_from=demo_model)
        return made[name]

    return get


class GpuProcess:
    """A real `python -m asynctsqp.gpu`."""

    module = "asynctsqp.gpu"

    def __init__(self, model: Path, *flags: str) -> None:
        command = [sys.executable, "-m", self.module, "--model", str(model), "--threads", "1", *flags]
        pipe = subprocess.PIPE
        with devices.shown() if "--device" in flags else contextlib.nullcontext():
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=ROOT, text=True)
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
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


class MaskPeerProcess(Introduced, GpuProcess):
    """A real `python -m asynctsqp.gpu --mask-peer-secret FILE`; the file is made if there is none."""

    def __init__(self, model: Path, secret: Path, *flags: str) -> None:
        super().__init__(model, "--mask-peer-secret", str(secret), *flags)
        assert self.process.stdout is not None
        word, _, self.key = self.process.stdout.readline().strip().partition(" ")
        assert word == "mask-peer-key", f"the mask peer said {word!r}"


@pytest.fixture
def start_mask_peer(tmp_path: Path) -> Iterator[Callable[..., MaskPeerProcess]]:
    """start_mask_peer(model, *flags) -> MaskPeerProcess with one and the same key all through a test."""
    started: list[MaskPeerProcess] = []

    def start(model: Path, *flags: str) -> MaskPeerProcess:
        where = () if "--bind" in flags else ("--bind", "tcp://127.0.0.1:0")
        started.append(MaskPeerProcess(model, tmp_path / "mask-peer.key", *where, *flags))
        return started[-1]

    yield start
    for process in started:
        process.stop()


@pytest.fixture(scope="session")
def tiny_mask_peer(
    private_tmp: Path, tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MaskPeerProcess]:
    """A mask peer with the tiny model `gqa`, shared by all tests: none may end it."""
    secret = tmp_path_factory.mktemp("mask-peer") / "key"
    process = MaskPeerProcess(tiny_model("gqa"), secret, "--bind", "tcp://127.0.0.1:0")
    yield process
    process.stop()


@pytest.fixture(scope="module")
def meddling(tiny_model: Callable[[str], Path], private_tmp: Path) -> Iterator[MeddlingGpu]:
    """A GPU side of the tiny model that shows what it gets, and may lie."""
    with meddling_gpu(tiny_model("gqa")) as gpu:
        yield gpu


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
    private = {f"{path}" for path in Path(tempfile.gettempdir()).glob("asynctsqp-*")}
    return shared | private | set(_processes())


def _processes() -> Iterator[str]:
    """Our packages' processes that this run started: its temporary directory tells, also for an orphan."""
    for process in psutil.process_iter():
        try:
            words = " ".join(process.cmdline())
            ours = process.environ().get("TMPDIR") == tempfile.gettempdir()
            if ours and process.pid != os.getpid() and "asynctsqp." in words:
                yield f"process {process.pid}: {words[:80]}"
        except psutil.Error:  # it ended while we looked, or it is not ours to look at
            continue


@pytest.fixture(autouse=True)
def leaves_nothing(private_tmp: Path, request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test leaves /dev/shm, the temporary directory and the process table as it found them."""
    before = _leftovers()
    yield
    give_up = time.monotonic() + SETTLE_S
    while (left := _leftovers() - before) and time.monotonic() < give_up:
        time.sleep(0.05)
    assert not left, f"the test left behind: {sorted(left)}"


@pytest.fixture(scope="session")
def tiny_gpus(private_tmp: Path, tiny_model: Callable[[str], Path]) -> Iterator[list[GpuProcess]]:
    """GPU sides with the tiny model `gqa`: the one in use is the last, those before it have died."""
    started = [GpuProcess(tiny_model("gqa"), "--bind", "tcp://127.0.0.1:0")]
    yield started
    for process in started:
        process.stop()


@pytest.fixture
def tiny_gpu(tiny_gpus: list[GpuProcess], tiny_model: Callable[[str], Path]) -> Iterator[GpuProcess]:
    """One GPU side with the tiny model `gqa`, shared by all tests: none may end it."""
    if tiny_gpus[-1].process.poll() is not None:
        tiny_gpus.append(GpuProcess(tiny_model("gqa"), "--bind", "tcp://127.0.0.1:0"))
    yield tiny_gpus[-1]
    assert tiny_gpus[-1].process.poll() is None, "the GPU side died"


@pytest.fixture
def good(tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]) -> Iterator[GoodTee]:
    """A well-behaved client that is connected before, during and after whatever the test does."""
    with raw_tee(tiny_gpu.endpoint) as peer:
        tee = GoodTee(peer, tiny_model("gqa"))
        tee.check()
        yield tee
        tee.check(rows=1)
        tee.check(rows=40)


@pytest.fixture
def connect(tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]) -> Callable[..., Engine]:
    """connect(**options) -> an engine that is yet to be opened, on the GPU side that all tests share."""

    def connect(**options: Any) -> Engine:
        return Engine.connect(tiny_model("gqa"), tiny_gpu.endpoint, **options)

    return connect
