"""What does not fit the memory is refused in one line with the arithmetic, before any of it is made."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.errors import BadInputError
from asynctsqp.memory import free_host_bytes, host_bytes
from asynctsqp.random_weights import RandomTensor
from gpu_side.device import choose
from gpu_side.server import Server
from gpu_side.weights import Weights as GpuWeights
from tee_side.weights import Weights as TeeWeights
from tests.conftest import GpuProcess
from tests.processes import assert_one_error, run_gpu, run_tee
from tests.test_random_weights import save_shapes

MIB = 1 << 20
CPU = torch.device("cpu")
HUGE = {"hidden_size": 4096, "intermediate_size": 1 << 26, "num_hidden_layers": 4}  # 12 TiB, but a small embedding


@pytest.fixture
def tiny(tmp_path: Path) -> Checkpoint:
    return Checkpoint.find(save_shapes(tmp_path / "tiny", hidden_size=512, attention_bias=True))


@pytest.fixture
def huge(tmp_path: Path) -> str:
    return save_shapes(tmp_path / "huge", **HUGE)


def linear_parameters(checkpoint: Checkpoint) -> int:
    """By transformers: all but norms and embedding."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(checkpoint.directory))
    modules = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_the_last_byte_decides(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch, dtype: str, width: int) -> None:
    reading = 512 * 512 * 2  # the largest tensors are as wide as the vocabulary
    needed = linear_parameters(tiny) * width + reading
    monkeypatch.setattr("gpu_side.memory.free_host_bytes", lambda: needed)
    GpuWeights(tiny, dtype, CPU)
    monkeypatch.setattr("gpu_side.memory.free_host_bytes", lambda: needed - 1)
    with (
        mock.patch.object(RandomTensor, "read_into", side_effect=AssertionError("it was made")),
        pytest.raises(BadInputError, match=f"tiny in {dtype} needs {linear_parameters(tiny):,} parameters x {width}"),
    ):
        GpuWeights(tiny, dtype, CPU)


def test_a_narrower_dtype_is_named_where_it_would_fit(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, advice in ((linear_parameters(tiny) * 3, "use --dtype bfloat16 or"), (1000, ": use a smaller model")):
        monkeypatch.setattr("gpu_side.memory.free_host_bytes", lambda free=free: free)
        with pytest.raises(BadInputError, match=advice):
            GpuWeights(tiny, "float32", CPU)


def test_the_embedding_has_to_fit_too(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tee_side.weights.free_host_bytes", lambda: 512 * 512 * 2 - 1)
    with pytest.raises(BadInputError, match="the embedding of random:tiny needs 262,144 parameters x 2 bytes"):
        TeeWeights(tiny, embedding=True)


def test_both_commands_say_so(huge: str) -> None:
    words = ("random:huge in float32 needs", "GiB are free", "use a smaller model")
    flags = ("--dtype", "float32", "--bind", "tcp://127.0.0.1:0")
    assert_one_error(run_gpu("--model", huge, *flags), 2, *words, program="asynctsqp.gpu")
    assert_one_error(run_tee("--model", huge, "--prompt", "Hello"), 2, *words)


def test_a_greeting_is_refused_and_the_next_one_heard(huge: str, start_gpu: Callable[..., GpuProcess]) -> None:
    server = start_gpu(Path(huge))
    for dtype in ("float32", "float32", "bfloat16"):
        ended = run_tee("--model", huge, "--gpu", server.endpoint, "--prompt", "Hello", "--dtype", dtype)
        assert_one_error(ended, 2, f"random:huge in {dtype} needs", "use a smaller model")


def test_one_load_at_a_time(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or two would be promised the same memory."""
    running: list[str] = []
    most: list[int] = []

    def load(checkpoint: Checkpoint, dtype: str, device: torch.device) -> str:
        running.append(dtype)
        time.sleep(0.05)
        most.append(len(running))
        running.remove(dtype)
        return dtype

    async def run() -> list[str]:
        server = Server(mock.Mock(), tiny, choose("cpu", 1), None)
        return await asyncio.gather(*(server.weights.of(dtype) for dtype in ("float32", "bfloat16", "float16")))

    monkeypatch.setattr("gpu_side.made_weights.Weights", load)
    assert asyncio.run(run()) == ["float32", "bfloat16", "float16"]
    assert most == [1, 1, 1]


def test_free_memory_is_less_than_all_of_it() -> None:
    assert 0 < free_host_bytes() < psutil.virtual_memory().total


MEMINFO = {
    "proc/meminfo": "MemTotal:    4096000 kB\nMemFree:    1000 kB\nMemAvailable:    2048000 kB\nHugePages_Total:  0\n\n"
}
V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"
OURS = {"proc/self/cgroup": "0::/ours/inner\n"}
OURS_V1 = {"proc/self/cgroup": "5:cpu,cpuacct:/other\n4:memory:/ours\n0::/ours\n"}


def group(path: str, limit: str, used: int, cached: int = 0) -> dict[str, str]:
    statistics = f"anon 5\nfile {cached + 7}\ninactive_file {cached}\nactive_file 0\n"
    return {
        f"{path}/memory.max": f"{limit}\n",
        f"{path}/memory.current": f"{used}\n",
        f"{path}/memory.stat": statistics,
    }


def group_v1(path: str, limit: int, used: int, cached: int) -> dict[str, str]:
    statistics = f"inactive_file 1\ntotal_inactive_file {cached - 1}\ntotal_active_file 1\n"
    return {
        f"{path}/memory.limit_in_bytes": f"{limit}\n",
        f"{path}/memory.usage_in_bytes": f"{used}\n",
        f"{path}/memory.stat": statistics,
    }


SYSTEMS: dict[str, tuple[dict[str, str], int]] = {
    "nothing to read": ({}, sys.maxsize),
    "no groups": (MEMINFO, 2000 * MIB),
    "no limit": (MEMINFO | OURS | group(f"{V2}/ours", "max", MIB), 2000 * MIB),
    "a limit": (MEMINFO | OURS | group(f"{V2}/ours/inner", str(500 * MIB), 100 * MIB), 400 * MIB),
    "cached files make way": (
        MEMINFO | OURS | group(f"{V2}/ours/inner", str(500 * MIB), 400 * MIB, cached=300 * MIB),
        400 * MIB,
    ),
    "a limit further out": (
        MEMINFO
        | OURS
        | group(f"{V2}/ours/inner", str(800 * MIB), MIB)
        | group(f"{V2}/ours", str(500 * MIB), 200 * MIB),
        300 * MIB,
    ),
    "a container sees its own group as the root": (
        MEMINFO | OURS | group(V2, str(500 * MIB), 100 * MIB),
        400 * MIB,
    ),
    "used up": (MEMINFO | OURS | group(V2, str(500 * MIB), 501 * MIB), 0),
    "version 1": (MEMINFO | OURS_V1 | group_v1(f"{V1}/ours", 500 * MIB, 400 * MIB, 200 * MIB), 300 * MIB),
    "version 1 without limit": (MEMINFO | OURS_V1 | group_v1(f"{V1}/ours", (1 << 63) - 4096, MIB, MIB), 2000 * MIB),
}


def write(files: dict[str, str], root: Path) -> None:
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content)


@pytest.mark.parametrize("name", SYSTEMS)
def test_free_memory_is_read_as_the_system_tells_it(name: str, tmp_path: Path) -> None:
    files, free = SYSTEMS[name]
    write(files, tmp_path)
    assert free_host_bytes(tmp_path) == free


def test_all_the_memory_there_is_is_the_machine_s() -> None:
    assert 0 < host_bytes() <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("nothing to read", sys.maxsize),
        ("no groups", 4000 * MIB),
        ("no limit", 4000 * MIB),
        ("a limit further out", 500 * MIB),
        ("used up", 500 * MIB),
        ("version 1", 500 * MIB),
        ("version 1 without limit", 4000 * MIB),
    ],
)
def test_a_container_has_no_more_than_its_limit(name: str, size: int, tmp_path: Path) -> None:
    write(SYSTEMS[name][0], tmp_path)
    assert host_bytes(tmp_path) == size
