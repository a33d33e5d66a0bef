"""The TEE side's memory, by the operating system's own account."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.integer_weights import matrices
from tests.conftest import ROOT, GpuProcess
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
import json, re, sys
from asynctsqp.tee import main
code = main()
status = open("/proc/self/status").read()
print("told", json.dumps([int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]), list(sys.modules)]))
sys.exit(code)
"""

# What a TEE side is before it has a model: the same modules, and the tokenizer as it loads it
IMPORT_AND_TELL = """
import contextlib, importlib, json, os, re, sys
from pathlib import Path
from asynctsqp.cores import openmp
os.environ |= openmp()
for name in json.load(sys.stdin):
    with contextlib.suppress(ModuleNotFoundError):  # what a library calls a part of itself is no file
        importlib.import_module(name)
from tee_side.tokenizer import Tokenizer
Tokenizer(Path(sys.argv[1]), 1 << 20).encode("Hi")
print(re.search(r"VmRSS:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


@dataclass(frozen=True)
class Told:
    """What a TEE side that has answered says of itself."""

    peak_bytes: int
    modules: list[str]


def ask(model: Path, endpoint: str, *flags: str) -> Told:
    command = [sys.executable, "-c", RUN_AND_TELL, "--model", str(model), "--gpu", endpoint, "--lanes", "1", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=250, check=True)
    peak, modules = json.loads(done.stdout.rsplit("told ", 1)[1])
    return Told(peak * 1024, modules)


def bytes_without_a_model(model: Path, modules: list[str]) -> int:
    command = [sys.executable, "-c", IMPORT_AND_TELL, str(model)]
    names = json.dumps([name for name in modules if name != "__main__"])
    done = subprocess.run(command, input=names, capture_output=True, text=True, cwd=ROOT, timeout=250, check=True)
    return int(done.stdout) * 1024


def test_memory_does_not_grow_with_the_linears(
    tmp_path: Path, demo_model: Path, start_gpu: Callable[..., GpuProcess]
) -> None:
    peaks, linears = [], []
    for name, intermediate_size in (("narrow", 256), ("wide", 65536)):
        linears.append(save_wide(tmp_path / name, intermediate_size, demo_model))
        server = start_gpu(tmp_path / name)
        flags = ("--prompt", "Hi", "--max-new-tokens", "4", "--slot-bytes", "4M")
        peaks.append(ask(tmp_path / name, server.endpoint, *flags).peak_bytes)
    print(f"linears {[size // MIB for size in linears]} MiB, TEE side's peak {[peak // MIB for peak in peaks]} MiB")
    assert linears[1] - linears[0] > 280 * MIB
    assert peaks[1] - peaks[0] < 32 * MIB


def test_the_demo_model_takes_little_more_than_it_holds(
    tmp_path: Path, demo_model: Path, start_gpu: Callable[..., GpuProcess]
) -> None:
    """At most 100 MB for all that a pass of 1024 tokens needs for a while.

    One lane, whose two slots are both in use: a second lane's memory would be allowed for and not touched.
    """
    prompt, new = tmp_path / "prompt", 4
    prompt.write_text(" hello" * 1024)
    flags = ("--prompt-file", str(prompt), "--max-new-tokens", str(new), "--ignore-eos")
    told = ask(demo_model, start_gpu(demo_model).endpoint, *flags)
    config = json.loads((demo_model / "config.json").read_text())
    hidden, layers, float32 = config["hidden_size"], config["num_hidden_layers"], 4
    held = {
        "embedding": config["vocab_size"] * hidden * float32,  # as the file has it
        "norms": (2 * layers + 1) * hidden * float32,
        "keys and values": (1024 + new) * layers * 2 * config["num_key_value_heads"] * config["head_dim"] * float32,
        "slots": 2 * 2 * 1024 * 2 * config["intermediate_size"] * float32,  # of a gate | up; requests and replies
    }
    extra = told.peak_bytes - bytes_without_a_model(demo_model, told.modules) - sum(held.values())
    print(f"held {[f'{name} {size // MIB} MiB' for name, size in held.items()]}, beyond that {extra // MIB} MiB")
    assert extra <= 100_000_000


def save_deep(directory: Path, tokenizer_from: Path) -> Checkpoint:
    """A model whose int8 weights are some 200 MB, none of which is large by itself."""
    sizes = {"hidden_size": 256, "intermediate_size": 32768, "num_hidden_layers": 8, "tie_word_embeddings": True}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**(BASE | sizes))).to(torch.bfloat16).save_pretrained(directory)
    copy_tokenizer(tokenizer_from, directory)
    return Checkpoint(directory)


def test_masks_take_the_memory_that_they_are_given_whatever_the_weights_take(
    tmp_path: Path, demo_model: Path, start_gpu: Callable[..., GpuProcess]
) -> None:
    """--protect full beside none: besides --mask-memory S, T and scales stay; the rest is for a while.

    One matrix at a time is in memory as in the file, as digits, and in part as float64; so is the products' self-test.
    """
    checkpoint = save_deep(tmp_path / "deep", demo_model)
    shapes = [checkpoint.spec.linears[op] for op, _ in matrices(checkpoint.spec)]
    weights = sum(one.out_features * one.in_features for one in shapes)
    checks = sum(64 * (one.out_features + one.in_features) + 4 * one.out_features for one in shapes)
    for_a_while = 256 * MIB
    endpoint = start_gpu(tmp_path / "deep").endpoint
    flags = ("--prompt", "Hi", "--max-new-tokens", "4", "--slot-bytes", "4M", "--kv-memory", "16M")
    none = ask(tmp_path / "deep", endpoint, *flags).peak_bytes
    growth = {}
    for memory in (32, 160):
        given = ("--protect", "full", "--mask-memory", f"{memory}M")
        growth[memory] = ask(tmp_path / "deep", endpoint, *flags, *given).peak_bytes - none
    print(
        f"int8 weights {weights // MIB} MiB, S, T and scales {checks // MIB} MiB, "
        f"growth by --mask-memory {[f'{memory}M: {size // MIB} MiB' for memory, size in growth.items()]}"
    )
    assert weights > 200_000_000
    for memory, size in growth.items():
        assert size < memory * MIB + checks + for_a_while
