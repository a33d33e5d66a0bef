"""The TEE side's memory, by the operating system's own account."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.conftest import ROOT
from tests.models import BASE, copy_tokenizer

MIB = 1 << 20


def save_wide(directory: Path, intermediate_size: int, tokenizer_from: Path) -> int:
    """A model whose linears can be made large without touching embedding and norms; returns their bytes."""
    sizes = {"hidden_size": 128, "intermediate_size": intermediate_size, "tie_word_embeddings": True}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(BASE | sizes)))
    model.save_pretrained(directory)
    copy_tokenizer(tokenizer_from, directory)
    return 3 * 3 * 128 * intermediate_size * 4


# VmHWM rather than wait4's ru_maxrss: that one starts from the size of the process that forked
RUN_AND_TELL = """
import re, sys
from asynctsqp.tee import main
code = main()
print("peak", re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
sys.exit(code)
"""


def peak_bytes(model: Path, endpoint: str) -> int:
    command = [sys.executable, "-c", RUN_AND_TELL, "--model", str(model), "--gpu", endpoint, "--prompt", "Hi"]
    command += ["--max-new-tokens", "4", "--slot-bytes", "4M", "--lanes", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=True)
    return int(done.stdout.rsplit("peak ", 1)[1]) * 1024


def test_memory_does_not_grow_with_the_linears(
    tmp_path: Path, demo_model: Path, start_gpu: Callable[..., object]
) -> None:
    peaks, linears = [], []
    for name, intermediate_size in (("narrow", 256), ("wide", 65536)):
        linears.append(save_wide(tmp_path / name, intermediate_size, demo_model))
        server = start_gpu(tmp_path / name)
        peaks.append(peak_bytes(tmp_path / name, server.endpoint))  # type: ignore[attr-defined]
    print(f"linears {[size // MIB for size in linears]} MiB, TEE side's peak {[peak // MIB for peak in peaks]} MiB")
    assert linears[1] - linears[0] > 280 * MIB
    assert peaks[1] - peaks[0] < 32 * MIB
