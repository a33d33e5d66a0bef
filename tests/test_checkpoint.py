"""Checkpoints as the safetensors library reads them, and fingerprints that notice a difference."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.errors import CheckpointError
from tests import models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reads_what_safetensors_reads(tiny_model: Callable[[str], Path], tmp_path: Path, dtype: torch.dtype) -> None:
    directory = copy_of(tiny_model("biases"), tmp_path)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(directory / "model.safetensors").items()}
    save_file(tensors, directory / "model.safetensors")
    checkpoint = Checkpoint.find(str(directory))
    for name, expected in tensors.items():
        assert torch.equal(checkpoint.read(name), expected)


def test_shards_are_the_same_model(tiny_model: Callable[[str], Path], tmp_path: Path, demo_model: Path) -> None:
    sharded = models.save_tiny(tmp_path, "gqa", tokenizer_from=demo_model, shard_size="6MB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    whole = tiny_model("gqa")
    assert Checkpoint(sharded).fingerprint() == Checkpoint(whole).fingerprint()
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(Checkpoint(sharded).read(name), Checkpoint(whole).read(name))


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.input_layernorm.weight", "model.layers.2.mlp.down_proj.weight"]
)
def test_another_weight_is_another_fingerprint(tiny_model: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    directory = copy_of(tiny_model("gqa"), tmp_path)
    tensors = load_file(directory / "model.safetensors")
    tensors[name].view(-1)[0] += 1
    save_file(tensors, directory / "model.safetensors")
    assert Checkpoint(directory).fingerprint() != Checkpoint(tiny_model("gqa")).fingerprint()


def test_an_index_cannot_point_elsewhere(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    directory = copy_of(tiny_model("gqa"), tmp_path)
    (directory / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "../../etc/passwd"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside"):
        Checkpoint(directory)


def copy_of(directory: Path, target: Path) -> Path:
    return Path(shutil.copytree(directory, target / "model"))
