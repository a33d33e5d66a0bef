"""--protect end to end: transformers with rounded weights is the oracle, and the levels agree to the last bit."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import asynctsqp
from asynctsqp import Engine
from asynctsqp.integer_weights import Matrix
from asynctsqp.model_spec import Op
from tee_side.masking import Pad
from tee_side.pads import BankPads
from tests.conftest import GpuProcess
from tests.conftest import run_tee as run_command
from tests.meddling_gpu import meddling_gpu
from tests.peers import weight_of
from tests.processes import WARNING, assert_one_error, run_tee, shared_memory_names

PROMPT = [1, *range(100, 140)]
LEVELS = ("verify", "mask", "full")
LARGEST = {8: 127, 12: 2047}
# Of scores, by bits: what rounding activations costs; finer weights leave them four bits less. Rounded weights cost 0.3
NEAR = {8: 2e-4, 12: 2e-3}
FEW_TOKENS = 16


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """What is left of a weight after symmetric rounding by rows, in numpy's float32 alone."""
    exact = weight.numpy()
    scales = np.abs(exact).max(axis=1, keepdims=True) / np.float32(LARGEST[bits])
    return torch.from_numpy(np.rint(exact / scales) * scales)


def oracle(model: Path, bits: int | None) -> LlamaForCausalLM:
    """transformers' own model, with the weights of its linears rounded; the embedding stays, also where it is tied."""
    llama = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if bits is not None:
        for module in llama.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight = torch.nn.Parameter(rounded(module.weight.detach(), bits))
    return llama


def scores_of(llama: LlamaForCausalLM, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return llama(torch.tensor([tokens])).logits[0]


def answer_of(llama: LlamaForCausalLM, prompt: list[int], new_tokens: int) -> list[int]:
    """Greedy, one token after another."""
    tokens = list(prompt)
    for _ in range(new_tokens):
        tokens.append(int(scores_of(llama, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


async def answer(engine: Engine, prompt: list[int] | str = PROMPT, new_tokens: int = FEW_TOKENS) -> list[int]:
    return (await engine.complete(prompt, max_new_tokens=new_tokens, temperature=0, ignore_eos=True)).token_ids


def run(connect: Callable[..., Engine], **options: Any) -> tuple[list[int], torch.Tensor]:
    """Tokens, and the scores of prompt and tokens."""

    async def both() -> tuple[list[int], torch.Tensor]:
        async with connect(**options) as engine:
            tokens = await answer(engine)
            return tokens, await engine.logits(PROMPT + tokens)

    return asyncio.run(both())


@pytest.mark.parametrize(
    ("name", "bits"), [("gqa", 8), ("biases", 8), ("mha-tied", 8), ("head-dim", 8), ("gqa", 12), ("biases", 12)]
)
def test_answers_are_those_of_the_rounded_weights(name: str, bits: int, tiny_model: Callable[[str], Path]) -> None:
    model = tiny_model(name)
    with meddling_gpu(model) as gpu:
        tokens, scores = run(
            lambda **options: Engine.connect(model, gpu.endpoint, **options), protect="full", weight_bits=bits
        )
    exact, other = oracle(model, bits), oracle(model, None if bits == 8 else 8)
    assert tokens == answer_of(exact, PROMPT, FEW_TOKENS)
    expected = scores_of(exact, PROMPT + tokens)
    assert (scores - expected).abs().max() < NEAR[bits]
    assert (scores_of(other, PROMPT + tokens) - expected).abs().max() > 0.1, "the oracle tells nothing apart"


SETTINGS: dict[str, dict[str, Any]] = {
    "one lane, bfloat16": {"lanes": 1, "dtype": "bfloat16"},
    "two lanes and chunks": {"lanes": 2, "chunk_tokens": 16},
    "no doorbell": {"transport": "shm", "doorbell": "off"},
    "a doorbell": {"transport": "shm", "doorbell": "on", "lanes": 1, "chunk_tokens": 7},
    "calls cut into blocks": {"slot_bytes": 196_608 + 4096, "lanes": 2, "chunk_tokens": 32},
    "binary, float16": {"transport": "binary", "lanes": 2, "chunk_tokens": 16, "dtype": "float16"},
    "msgpack, 12 bits": {"transport": "msgpack", "weight_bits": 12, "chunk_tokens": 16},
    "streamed weights": {"mask_memory": 1 << 20},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_levels_agree_to_the_last_bit(
    setting: str, connect: Callable[..., Engine], tiny_model: Callable[[str], Path]
) -> None:
    """What was masked is the integer product that was not, whatever the lanes and transports."""
    options = SETTINGS[setting]
    levels = [level for level in LEVELS if level != "verify" or "mask_memory" not in options]
    results = [run(connect, protect=level, **options) for level in levels]
    tokens, scores = results[0]
    bits = options.get("weight_bits", 8)
    exact = oracle(tiny_model("gqa"), bits)
    assert tokens == answer_of(exact, PROMPT, FEW_TOKENS)
    assert (scores - scores_of(exact, PROMPT + tokens)).abs().max() < NEAR[bits]
    for other_tokens, other_scores in results[1:]:
        assert other_tokens == tokens
        assert torch.equal(other_scores, scores)


def test_requests_at_once_get_their_own_answers(connect: Callable[..., Engine]) -> None:
    prompts = [[1, *range(start, start + length)] for start, length in ((100, 40), (300, 5), (500, 90), (700, 1))]

    async def both() -> tuple[list[list[int]], list[list[int]]]:
        async with connect(protect="full", chunk_tokens=16) as engine:
            alone = [await answer(engine, prompt) for prompt in prompts]
            return alone, await asyncio.gather(*(answer(engine, prompt) for prompt in prompts))

    alone, together = asyncio.run(both())
    assert together == alone
    assert len({tuple(tokens) for tokens in alone}) == len(prompts)


def test_requests_that_are_given_up_disturb_nobody(connect: Callable[..., Engine]) -> None:
    """Their pads are burnt, and the others' answers stay what they were."""

    async def give_up(engine: Engine, after: int) -> None:
        stream = engine.generate(PROMPT[: 5 + after], max_new_tokens=100, temperature=0, ignore_eos=True)
        async for _ in stream:
            after -= 1
            if after <= 0:
                break
        await stream.aclose()

    async def work() -> None:
        async with connect(protect="full", chunk_tokens=8, lanes=2) as engine:
            expected = await answer(engine)
            leaving = [give_up(engine, after) for after in range(8)]
            found, *_ = await asyncio.gather(answer(engine), *leaving)
            hurried = asyncio.ensure_future(answer(engine, [1, *range(600, 800)]))
            await asyncio.sleep(0.02)
            hurried.cancel()
            assert found == expected
            assert await answer(engine) == expected

    asyncio.run(work())


@pytest.mark.parametrize("transport", ["shm", "binary"])
def test_a_gpu_side_killed_in_between_changes_no_token(
    transport: str, tiny_model: Callable[[str], Path], start_gpu: Callable[..., GpuProcess]
) -> None:
    model = tiny_model("gqa")

    async def work() -> None:
        gpu = start_gpu(model)
        options = {"protect": "full", "reconnect_s": 30, "transport": transport}
        async with Engine.connect(model, gpu.endpoint, **options) as engine:
            expected = await answer(engine, new_tokens=60)
            found = list[int]()
            async for piece in engine.generate(PROMPT, max_new_tokens=60, temperature=0, ignore_eos=True):
                found.append(piece.token_id)
                if len(found) == 10:
                    await asyncio.to_thread(gpu.kill)
                    await asyncio.to_thread(start_gpu, model, "--bind", gpu.endpoint)
            assert found == expected
        assert not shared_memory_names()

    asyncio.run(work())


@pytest.mark.parametrize("level", ["none", *LEVELS])
def test_the_command_says_what_can_be_read(level: str, tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]) -> None:
    flags = ("--model", str(tiny_model("gqa")), "--gpu", tiny_gpu.endpoint, "--json", "--temperature", "0")
    ended = run_tee(*flags, "--protect", level, "--prompt", "Once upon a time", "--max-new-tokens", "4")
    assert ended.code == 0, ended.err
    result = json.loads(ended.out)
    assert result["config"]["protect"] == level
    assert result["completion_tokens"] == 4
    warnings = [line for line in ended.err.splitlines() if line.startswith(WARNING)]
    assert [f"--protect {level}" in line for line in warnings] == [True] * (level in ("none", "verify"))


def test_the_command_with_a_gpu_side_of_its_own(tiny_model: Callable[[str], Path]) -> None:
    model = tiny_model("gqa")
    flags = ("--model", str(model), "--protect", "full", "--weight-bits", "12", "--dtype", "bfloat16", "--json")
    done = run_command(
        *flags, "--prompt", "Once upon a time", "--max-new-tokens", "8", "--temperature", "0", "--ignore-eos"
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "nothing readable leaves, so there is nothing to warn of"
    tokens = json.loads(done.stdout)["token_ids"]
    from transformers import AutoTokenizer

    prompt = AutoTokenizer.from_pretrained(model).encode("Once upon a time")
    assert tokens == answer_of(oracle(model, 12), prompt, 8)


def test_masks_made_ahead_are_used(connect: Callable[..., Engine]) -> None:
    async def work() -> None:
        async with connect(protect="full") as engine:
            assert await engine.prepare_masks(len(PROMPT) + 20) >= len(PROMPT) + 20
            expected = await answer(engine)
        async with connect(protect="full", mask_memory="1M") as engine:
            assert 0 < await engine.prepare_masks(10_000) < 10
            assert await answer(engine) == expected
        async with connect(protect="verify") as engine:
            assert await engine.prepare_masks(10) == 0

    asyncio.run(work())


def copy_of(model: Path, directory: Path, name: str) -> Path:
    """The model, with one weight in the middle of a matrix changed: where no fingerprint's sample lies."""
    shutil.copytree(model, directory)
    change_a_weight(directory, name)
    return directory


def change_a_weight(model: Path, name: str) -> None:
    from asynctsqp.checkpoint import Checkpoint

    entry = Checkpoint(model).tensors[name]
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(entry.offset + 4 * (entry.shape[1] * 3 + 5))
        file.write(np.float32(0.77).tobytes())


def test_a_gpu_side_with_one_other_weight_is_refused(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """By both levels of arithmetic's own hash: the sample of the fingerprint does not notice it."""
    model = tiny_model("gqa")
    name = "model.layers.1.mlp.down_proj.weight"
    changed = copy_of(model, tmp_path / "changed", name)
    assert not torch.equal(weight_of(model, name), weight_of(changed, name))
    with meddling_gpu(changed) as gpu:
        flags = ("--model", str(model), "--gpu", gpu.endpoint, "--prompt", "x", "--max-new-tokens", "1")
        assert run_tee(*flags).code == 0
        assert_one_error(run_tee(*flags, "--protect", "full"), 2, "the same model files")


def test_weights_that_change_on_the_disk_are_noticed(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """A host may swap the file while masks are made from it: what is read again must be what was read first."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model("gqa"), model)

    async def work() -> None:
        with meddling_gpu(model) as gpu:
            async with Engine.connect(model, gpu.endpoint, protect="mask", mask_memory="1M") as engine:
                await answer(engine, new_tokens=2)
                change_a_weight(model, "lm_head.weight")
                with pytest.raises(asynctsqp.IntegrityError, match="files changed"):
                    await answer(engine, new_tokens=40)
                assert engine.failure is None, "no answer was wrong"

    asyncio.run(work())


class FullBank:
    """A bank that has all masks and no room: counts how often it is asked to make more."""

    rows = 0

    def __init__(self) -> None:
        self.asked = 0

    def fill_next(self) -> bool:
        self.asked += 1
        return False

    def take_ready(self, matrix: Matrix, rows: int) -> Pad | None:
        return Pad(np.zeros((1, 1), np.int32), np.zeros((1, 1), np.int32))


def test_a_full_bank_is_not_asked_for_more_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """On many cores it is filled while requests run; a look wakes a thread up, and a token has a hundred calls."""
    monkeypatch.setattr("tee_side.pads.cores", lambda: list(range(64)))

    async def work() -> int:
        bank: Any = FullBank()
        pads = BankPads(bank, threads=1)
        with pads.working():
            for _ in range(300):
                await pads.take((Op.O, 0), 1)
                await asyncio.sleep(0.0005)
        await pads.close()
        return bank.asked

    assert 1 < asyncio.run(work()) < 100
