"""Whatever is wrong with the arguments: one line, exit code 2, nothing left running."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import posix_ipc
import pytest

from tests.conftest import GpuProcess
from tests.processes import assert_one_error, run_gpu, run_tee, shared_memory_names, tee_process

PROMPT = ("--prompt", "Once upon a time", "--max-new-tokens", "2", "--temperature", "0")


NONSENSE: list[tuple[str, ...]] = [
    ("--lanes", "0"),
    ("--lanes", "-1"),
    ("--lanes", "65"),
    ("--lanes", "two"),
    ("--top-p", "0"),
    ("--top-p", "2"),
    ("--top-p", "nan"),
    ("--top-k", "-1"),
    ("--top-k", "1.5"),
    ("--temperature", "-1"),
    ("--temperature", "nan"),
    ("--temperature", "inf"),
    ("--temperature", "warm"),
    ("--max-new-tokens", "0"),
    ("--max-new-tokens", "-5"),
    ("--seed", "99999999999999999999999"),
    ("--seed", "x"),
    ("--stop", ""),
    ("--chunk-tokens", "0"),
    ("--slot-bytes", "0"),
    ("--slot-bytes", "5000"),
    ("--slot-bytes", "16Q"),
    ("--slot-bytes", "-4096"),
    ("--kv-memory", "0"),
    ("--kv-memory", "much"),
    ("--reconnect-s", "-1"),
    ("--reconnect-s", "nan"),
    ("--threads", "0"),
    ("--threads", "99999999"),
    ("--dtype", "int8"),
    ("--partition", "none"),
    ("--weight-bits", "9"),
    ("--weight-bits", "12"),
    ("--mask-memory", "1G"),
    ("--mask-memory", "1G", "--protect", "verify"),
    ("--mask-memory", "1000", "--protect", "full"),
    ("--mask-memory", "0", "--protect", "full"),
    ("--no-such-flag",),
    ("--prompt", "a", "--prompt-file", "b"),
    ("--shm-name", "a/b"),
    ("--shm-name", "/" + "a" * 300),
    ("--shm-name", "/name", "--transport", "binary"),
    ("--compress", "lz4", "--transport", "shm"),
    ("--protect", "mask", "--partition", "fused"),
    ("--doorbell", "on", "--transport", "msgpack"),
    ("--log-rpc", "/"),
    ("--trace", "/no/such/directory/trace.json"),
    ("--gpu", ""),
    ("--gpu", "127.0.0.1:5555"),
    ("--gpu", "http://127.0.0.1:5555"),
    ("--gpu", "inproc://gpu"),
    ("--gpu", "tcp://127.0.0.1"),
    ("--gpu", "tcp://127.0.0.1:port"),
    ("--gpu", "tcp://127.0.0.1:99999"),
    ("--gpu", "ipc://" + "a" * 200),
]


@pytest.mark.parametrize("flags", NONSENSE, ids=lambda flags: " ".join(flags)[:40])
def test_a_flag_that_cannot_be_met(flags: tuple[str, ...], tiny_model: Callable[[str], Path]) -> None:
    prompt = () if "--prompt" in flags else PROMPT[:2]
    assert_one_error(run_tee("--model", str(tiny_model("gqa")), *prompt, *flags), 2)


def test_no_model_is_told_in_one_line() -> None:
    assert_one_error(run_tee(*PROMPT), 2, "--model")
    assert_one_error(run_gpu(), 2, "--model", program="asynctsqp.gpu")


@pytest.fixture
def prompt_files(tmp_path: Path) -> dict[str, tuple[str, ...]]:
    (tmp_path / "empty").touch()
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    return {
        "an empty argument": ("--prompt", ""),
        "an empty argument in a chat": ("--chat", "--prompt", ""),
        "an empty file": ("--prompt-file", str(tmp_path / "empty")),
        "no file": ("--prompt-file", str(tmp_path / "missing")),
        "a directory": ("--prompt-file", str(tmp_path)),
        "a file in another encoding": ("--prompt-file", str(tmp_path / "latin")),
        "empty standard input": (),
        "an argument that is no text": ("--prompt", "caf\udce9"),
    }


NAMES = (
    "an empty argument",
    "an empty argument in a chat",
    "an empty file",
    "no file",
    "a directory",
    "a file in another encoding",
    "empty standard input",
    "an argument that is no text",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_that_cannot_be_read(
    name: str, prompt_files: dict[str, tuple[str, ...]], tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]
) -> None:
    flags = ("--model", str(tiny_model("gqa")), "--gpu", tiny_gpu.endpoint)
    ended = run_tee(*flags, *prompt_files[name])
    assert_one_error(ended, 2, "prompt")
    assert "Errno" not in ended.err


def test_a_prompt_past_the_context(tiny_model: Callable[[str], Path]) -> None:
    """With a local GPU side, which must go with the error."""
    assert_one_error(run_tee("--model", str(tiny_model("gqa")), stdin="many words " * 400), 2, "context", "512")


def test_a_prompt_that_does_not_fit_the_kv_memory(tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]) -> None:
    flags = ("--model", str(tiny_model("gqa")), "--gpu", tiny_gpu.endpoint)
    assert_one_error(run_tee(*flags, *PROMPT, "--kv-memory", "4K"), 2, "--kv-memory")


def test_a_full_dev_shm(tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]) -> None:
    disk = os.statvfs("/dev/shm")
    slot = disk.f_blocks * disk.f_frsize // 4096 * 4096  # four of them are four times what there is
    flags = ("--model", str(tiny_model("gqa")), *PROMPT, "--lanes", "1", "--slot-bytes", str(slot))
    assert_one_error(run_tee(*flags, "--gpu", tiny_gpu.endpoint), 2, "/dev/shm")
    assert_one_error(run_tee(*flags), 2, "/dev/shm")
    assert not shared_memory_names()


def test_a_slot_smaller_than_a_row(tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]) -> None:
    flags = ("--model", str(tiny_model("gqa")), "--gpu", tiny_gpu.endpoint)
    assert_one_error(run_tee(*flags, *PROMPT, "--slot-bytes", "4096"), 2, "--slot-bytes", str(4 * 49152))


def test_a_region_name_that_is_taken(tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]) -> None:
    name = f"/taken-{os.getpid()}"
    taken = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, size=4096)
    try:
        flags = ("--model", str(tiny_model("gqa")), "--gpu", tiny_gpu.endpoint, "--shm-name", name)
        assert_one_error(run_tee(*flags, *PROMPT), 2, name)
        assert os.path.exists(f"/dev/shm{name}"), "it is somebody else's"
    finally:
        taken.close_fd()
        taken.unlink()


def test_the_commands_themselves_end_with_one_line(tiny_model: Callable[[str], Path]) -> None:
    """The same as real processes: nothing is printed by a dying interpreter either."""
    with tee_process("--model", "no-such-directory", *PROMPT) as tee:
        assert_one_error(tee.end(), 2, "no-such-directory")
    with tee_process("--model", str(tiny_model("gqa")), "--prompt", "many words " * 400) as tee:
        assert_one_error(tee.end(), 2, "context")
    with tee_process("--model", str(tiny_model("gqa")), *PROMPT, "--device", "cpu") as tee:
        assert_one_error(tee.end(), 2, "--device")
