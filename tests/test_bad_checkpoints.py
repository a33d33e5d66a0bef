"""Model directories that are missing, damaged or of another kind: one line, exit code 2, on both sides."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from asynctsqp.errors import CheckpointError
from tee_side.tokenizer import Tokenizer
from tests.processes import assert_one_error, run_gpu, run_tee


def on_disk(model: Path) -> Path:
    return model / "model.safetensors"


def truncate(model: Path, size: int) -> None:
    with on_disk(model).open("r+b") as file:
        file.truncate(size)


def cut_off(model: Path, missing: int) -> None:
    truncate(model, on_disk(model).stat().st_size - missing)


def overwrite(model: Path, offset: int, content: bytes) -> None:
    with on_disk(model).open("r+b") as file:
        file.seek(offset)
        file.write(content)


def header(model: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Writes the file again with a changed header before the same tensors."""
    content = on_disk(model).read_bytes()
    size = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + size])
    change(entries)
    changed = json.dumps(entries).encode()
    on_disk(model).write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + size :])


def config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without(model: Path, name: str) -> None:
    tensors = load_file(on_disk(model))
    del tensors[name]
    save_file(tensors, on_disk(model))


def transposed(model: Path, name: str) -> None:
    tensors = load_file(on_disk(model))
    tensors[name] = tensors[name].T.contiguous()
    save_file(tensors, on_disk(model))


def as_integers(model: Path, name: str) -> None:
    tensors = load_file(on_disk(model))
    tensors[name] = tensors[name].int()
    save_file(tensors, on_disk(model))


def index_of(model: Path, content: object) -> None:
    on_disk(model).unlink()
    text = content if isinstance(content, str) else json.dumps(content)
    (model / "model.safetensors.index.json").write_text(text)


UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"

DAMAGE: dict[str, Callable[[Path], Any]] = {
    "no directory": shutil.rmtree,
    "an empty directory": lambda model: (shutil.rmtree(model), model.mkdir()),
    "a file instead": lambda model: (shutil.rmtree(model), model.write_text("a file")),
    "no config": lambda model: (model / "config.json").unlink(),
    "an empty config": lambda model: (model / "config.json").write_text(""),
    "a config that is no JSON": lambda model: (model / "config.json").write_text("{model_type: llama"),
    "a config that is no text": lambda model: (model / "config.json").write_bytes(b'{"model_type": "\xff\xfe"}'),
    "a config that is a list": lambda model: (model / "config.json").write_text("[]"),
    "not a LLaMA": lambda model: config(model, model_type="gpt2"),
    "no hidden size": lambda model: config(model, hidden_size=None),
    "hidden size 0": lambda model: config(model, hidden_size=0),
    "a negative number of layers": lambda model: config(model, num_hidden_layers=-1),
    "a billion layers": lambda model: config(model, num_hidden_layers=10**9),
    "heads that do not divide": lambda model: config(model, num_key_value_heads=3),
    "an odd head size": lambda model: config(model, head_dim=15),
    "another activation": lambda model: config(model, hidden_act="gelu"),
    "an unknown rope": lambda model: config(model, rope_parameters={"rope_type": "spiral", "rope_theta": 1.0}),
    "a rope without its numbers": lambda model: config(model, rope_parameters={"rope_type": "llama3"}),
    "another vocabulary": lambda model: config(model, vocab_size=1000),
    "no weights": lambda model: on_disk(model).unlink(),
    "an empty weight file": lambda model: truncate(model, 0),
    "a weight file of 5 bytes": lambda model: truncate(model, 5),
    "a weight file cut in its header": lambda model: truncate(model, 500),
    "a weight file that lacks a byte": lambda model: cut_off(model, 1),
    "a weight file that lacks a mebibyte": lambda model: cut_off(model, 1 << 20),
    "an endless header": lambda model: overwrite(model, 0, b"\xff" * 8),
    "a header that is no JSON": lambda model: overwrite(model, 8, b"\x00" * 64),
    "a header that is no text": lambda model: overwrite(model, 10, b"\xff\xfe\xfd"),
    "a header that is a list": lambda model: overwrite(model, 0, (2).to_bytes(8, "little") + b"[]"),
    "offsets that go backwards": lambda model: header(model, lambda h: h[NORM].update(data_offsets=[100, 0])),
    "negative offsets": lambda model: header(model, lambda h: h[NORM].update(data_offsets=[-256, 0])),
    "offsets past the end": lambda model: header(model, lambda h: h[NORM].update(data_offsets=[2**40, 2**40 + 256])),
    "offsets beyond 64 bits": lambda model: header(model, lambda h: h[NORM].update(data_offsets=[0, 2**70])),
    "a negative shape": lambda model: header(model, lambda h: h[NORM].update(shape=[-8, -8])),
    "a shape that does not fit": lambda model: header(model, lambda h: h[NORM].update(shape=[65])),
    "no shape": lambda model: header(model, lambda h: h[NORM].pop("shape")),
    "an unknown dtype": lambda model: header(model, lambda h: h[NORM].update(dtype="F1")),
    "a missing linear": lambda model: without(model, UP),
    "a missing norm": lambda model: without(model, NORM),
    "a missing embedding": lambda model: without(model, "model.embed_tokens.weight"),
    "a transposed linear": lambda model: transposed(model, UP),
    "an integer linear": lambda model: as_integers(model, UP),
    "an index that is no JSON": lambda model: index_of(model, "{"),
    "an index without a map": lambda model: index_of(model, {}),
    "an index of missing shards": lambda model: index_of(
        model, {"weight_map": {UP: "model-00001-of-00001.safetensors"}}
    ),
    "an index of a directory": lambda model: index_of(model, {"weight_map": {UP: "."}}),
}

ONLY_TEE: dict[str, Callable[[Path], Any]] = {
    "no tokenizer": lambda model: (model / "tokenizer.json").unlink(),
    "a damaged tokenizer": lambda model: (model / "tokenizer.json").write_text("{"),
    "a damaged generation config": lambda model: (model / "generation_config.json").write_text("{"),
    "a nonsensical generation config": lambda model: (model / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": "hot"}'
    ),
}


@pytest.fixture
def model(tmp_path: Path, tiny_model: Callable[[str], Path]) -> Path:
    return Path(shutil.copytree(tiny_model("gqa"), tmp_path / "model"))


@pytest.mark.parametrize("name", [*DAMAGE, *ONLY_TEE])
def test_the_tee_side_refuses_it(name: str, model: Path) -> None:
    (DAMAGE | ONLY_TEE)[name](model)
    ended = run_tee("--model", str(model), "--prompt", "Hello", "--max-new-tokens", "2")
    assert_one_error(ended, 2)


@pytest.mark.parametrize("name", [name for name in DAMAGE if "rope" not in name])
def test_the_gpu_side_refuses_it(name: str, model: Path) -> None:
    DAMAGE[name](model)
    ended = run_gpu("--model", str(model), "--bind", "tcp://127.0.0.1:0")
    assert_one_error(ended, 2, program="asynctsqp.gpu")


@pytest.mark.parametrize("name", ["gpt2", "no-such/model", "../model", "a/b/c", ""])
def test_a_name_that_is_no_model(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    assert_one_error(run_tee("--model", name, "--prompt", "Hello"), 2)
    assert_one_error(run_gpu("--model", name, "--bind", "tcp://127.0.0.1:0"), 2, program="asynctsqp.gpu")


def test_no_chat_template(model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    assert_one_error(run_tee("--model", str(model), "--chat", "--prompt", "Hello"), 2, "chat template")


def test_code_beside_a_tokenizer_is_never_run(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask at the terminal whether to run it: here somebody says yes to everything."""
    model = shutil.copytree(demo_model, tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["theirs.Theirs", "theirs.Theirs"]}}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as Theirs\n"
    (model / "theirs.py").write_text(code)
    monkeypatch.setattr("builtins.input", lambda *_: "yes")
    with contextlib.suppress(CheckpointError):
        Tokenizer(model, 1 << 20)
    assert not ran.exists()
