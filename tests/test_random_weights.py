"""`random:NAME`: the shapes of the models that it is named after, the same weights wherever they are made."""

from __future__ import annotations

import asyncio
import hashlib
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from asynctsqp import Engine
from asynctsqp.checkpoint import Checkpoint
from asynctsqp.model_spec import Op
from asynctsqp.random_weights import SHAPES
from gpu_side.weights import Weights as GpuWeights
from tee_side.tokenizer import Tokenizer
from tee_side.weights import Weights as TeeWeights
from tests.models import BASE
from tests.processes import assert_one_error, run_gpu, run_tee

PARAMETERS = {"tinyllama-1.1b": 1_100_048_384, "llama-3.2-1b": 1_235_814_400, "llama-3.1-8b": 8_030_261_248}
ROPE = {
    "tinyllama-1.1b": {"rope_type": "default", "rope_theta": 10000.0},
    "llama-3.2-1b": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0},
    "llama-3.1-8b": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0},
}
UP, DOWN = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"


def save_shapes(directory: Path, **changes: Any) -> str:
    """A config and a tokenizer without weights -> the name of the random model in these shapes."""
    LlamaConfig(**(BASE | {"vocab_size": 512} | changes)).save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHAPES / "tinyllama-1.1b" / file, directory / file)
    return f"random:{directory}"


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def tiny(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return save_shapes(tmp_path / "tiny", tie_word_embeddings=request.param)


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_are_those_of_transformers(name: str) -> None:
    checkpoint = Checkpoint.find(f"random:{name}")
    with torch.device("meta"):
        model = LlamaForCausalLM(AutoConfig.from_pretrained(checkpoint.directory))
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}  # a tied one comes once
    assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == expected
    assert sum(math.prod(shape) for shape in expected.values()) == PARAMETERS[name]
    assert model.config.rope_parameters.items() >= ROPE[name].items()
    assert all(tensor.dtype == torch.bfloat16 for tensor in checkpoint.tensors.values())


def test_a_tensor_depends_on_names_alone(tmp_path: Path) -> None:
    first = Checkpoint.find(save_shapes(tmp_path / "one" / "tiny"))
    second = Checkpoint.find(save_shapes(tmp_path / "other" / "tiny"))
    names = list(first.tensors)
    made = {name: first.read(name) for name in names}
    assert all(torch.equal(second.read(name), made[name]) for name in reversed(names))
    assert first.fingerprint() == second.fingerprint()
    renamed = Checkpoint.find(save_shapes(tmp_path / "another"))
    assert not torch.equal(renamed.read(UP), made[UP])
    assert renamed.fingerprint() != first.fingerprint()


@pytest.mark.parametrize("start", [0, 2, 7, 8, 262_142, 300_001])
def test_a_part_is_a_part_of_the_whole(tmp_path: Path, start: int) -> None:
    checkpoint = Checkpoint.find(save_shapes(tmp_path / "tiny", intermediate_size=2501))
    whole = checkpoint.read(UP).view(torch.uint8).numpy().tobytes()
    for size in (1, 6, 256, len(whole)):
        assert checkpoint.tensors[UP].read_range(start, size) == whole[start : start + size]


def test_the_weights_of_a_known_model_stay_what_they_are() -> None:
    """Figures that were measured on a model must be comparable with those of the next version of numpy or torch."""
    part = Checkpoint.find("random:llama-3.1-8b").tensors[UP].read_range(1 << 20, 1 << 20)
    assert hashlib.sha256(part).hexdigest()[:16] == "ece3c4c3f03f7dd5"


@pytest.mark.parametrize("name", [UP, DOWN, "model.layers.1.self_attn.v_proj.weight"])
def test_a_product_is_as_large_as_what_goes_in(name: str) -> None:
    matrix = Checkpoint.find("random:tinyllama-1.1b").read(name).float()
    std = matrix.shape[1] ** -0.5
    assert matrix.double().mean().abs() < 6 * std / matrix.numel() ** 0.5
    assert matrix.std().item() == pytest.approx(std, rel=2e-3)
    assert matrix.abs().max() <= 1.01 * 3**0.5 * std
    assert matrix.unique().numel() > 2000  # bfloat16 has 128 in each octave, of either sign
    product = torch.randn(8, matrix.shape[1]) @ matrix.T
    assert product.std().item() == pytest.approx(1, rel=0.1)


def test_rows_and_tensors_are_independent() -> None:
    checkpoint = Checkpoint.find("random:tinyllama-1.1b")
    gate = checkpoint.read("model.layers.1.mlp.gate_proj.weight")[:256].float()
    rows = torch.cat([gate, checkpoint.read(UP)[:256].float()])
    correlations = torch.corrcoef(rows).fill_diagonal_(0)
    assert correlations.abs().max() < 6.5 / gate.shape[1] ** 0.5


def test_norms_are_near_one(tmp_path: Path) -> None:
    checkpoint = Checkpoint.find(save_shapes(tmp_path / "tiny"))
    norms = torch.stack([checkpoint.read(name).float() for name in checkpoint.tensors if name.endswith("norm.weight")])
    assert len(norms) == 2 * BASE["num_hidden_layers"] + 1
    assert (norms - 1).abs().max() < 0.25


def test_a_directory_whose_name_is_no_text(tmp_path: Path) -> None:
    checkpoint = Checkpoint.find(save_shapes(tmp_path / "caf\udce9"))
    assert checkpoint.name == "random:caf?"
    assert checkpoint.read(UP).isfinite().all()


def test_the_sides_have_the_same_model(tmp_path: Path) -> None:
    model = save_shapes(tmp_path / "tiny", tie_word_embeddings=True)
    trusted = TeeWeights(Checkpoint.find(model), embedding=True)
    untrusted = GpuWeights(Checkpoint.find(model), "bfloat16", torch.device("cpu"))
    embedding = trusted.embed(np.arange(512))
    assert np.array_equal(untrusted.linear(Op.LM_HEAD, 0).weight.to_dense().float().numpy(), embedding)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_engine_runs_it_as_transformers_does(tiny: str, dtype: str) -> None:
    prompt = [1, 5, 300, 511, 64, 7]
    expected = reference(tiny)
    with torch.no_grad():
        scores = expected(torch.tensor([prompt])).logits[0]
        tokens = expected.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)

    async def run() -> tuple[torch.Tensor, list[int]]:
        async with Engine.launch(tiny, dtype=dtype, threads=1) as engine:
            answer = await engine.complete(prompt, max_new_tokens=12, temperature=0)
            return await engine.logits(prompt), answer.token_ids

    found, answered = asyncio.run(run())
    tolerance = {"float32": 1e-4, "bfloat16": 0.15, "float16": 0.02}[dtype]
    torch.testing.assert_close(found, scores, rtol=0, atol=tolerance)
    if dtype == "float32":
        assert answered == tokens[0, len(prompt) :].tolist()


def reference(model: str) -> LlamaForCausalLM:
    checkpoint = Checkpoint.find(model)
    reference = LlamaForCausalLM(LlamaConfig.from_pretrained(checkpoint.directory)).eval()
    state = {name: checkpoint.read(name).float() for name in checkpoint.tensors}
    missing, unexpected = reference.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}  # tied
    return reference


def test_prompts_of_every_kind_and_streaming(tiny: str) -> None:
    prompts: list[Any] = ["Grüße, 世界", [5, 511], [{"role": "user", "content": "Hello"}]]

    async def run() -> None:
        async with Engine.launch(tiny, threads=1) as engine:
            for prompt in prompts:
                pieces = [piece async for piece in engine.generate(prompt, max_new_tokens=24, ignore_eos=True)]
                assert len(pieces) == 24
                answer = await engine.complete(prompt, max_new_tokens=24, ignore_eos=True)
                assert "".join(piece.text for piece in pieces) == answer.text

    asyncio.run(run())


def test_text_is_bytes_in_every_known_model() -> None:
    text = "".join(map(chr, range(1, 0x500)))
    for name in PARAMETERS:
        tokenizer = Tokenizer(SHAPES / name, 32_000)
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert len(tokenizer.encode(text)) == len(text.encode())
        assert tokenizer.decode([31_000]) == ""


@pytest.mark.parametrize(
    "name", ["random:", "random:gpt2", "random:llama-3.1-405b", "random:/no/such/directory", "random:" + 5000 * "x"]
)
def test_an_unknown_name(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert_one_error(run_tee("--model", name, "--prompt", "Hello"), 2, *PARAMETERS)
    assert_one_error(run_gpu("--model", name, "--bind", "tcp://127.0.0.1:0"), 2, *PARAMETERS, program="asynctsqp.gpu")
