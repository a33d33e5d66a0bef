"""Every partition, over every transport: transformers' tokens and scores, and the number of calls that it is for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import asynctsqp
from asynctsqp.config import EngineOptions
from asynctsqp.layouts import OPERATIONS, Layouts
from asynctsqp.messages import Call, Done
from asynctsqp.model_spec import PARTS, ModelSpec, Op
from tests.clients import DONE, REFUSED, WELCOME, call
from tests.conftest import GpuProcess, run_tee
from tests.peers import lying_gpu, raw_tee
from tests.test_parity import DEMO_PROMPTS, encode, oracle, reference

PARTITIONS = tuple(OPERATIONS)
LADDER = tuple(name for name in PARTITIONS if name != "shielded")  # test_parity.py has that one
PROMPT = [1, *range(100, 300, 2)]
FEW_TOKENS = 24


def scores_of(model: Path, tokens: list[int]) -> torch.Tensor:
    """transformers' own, float32."""
    with torch.no_grad():
        return oracle(model)(torch.tensor([tokens])).logits[0]


async def answer(engine: asynctsqp.Engine, prompt: Any = PROMPT, tokens: int = FEW_TOKENS) -> list[int]:
    return (await engine.complete(prompt, max_new_tokens=tokens, temperature=0, ignore_eos=True)).token_ids


@pytest.mark.parametrize("name", ["gqa", "biases", "head-dim", "mha-tied", "dynamic-rope", "1-layers"])
def test_tiny_models_answer_like_transformers(
    name: str, tiny_model: Callable[[str], Path], start_gpu: Callable[..., GpuProcess]
) -> None:
    model = tiny_model(name)
    endpoint = start_gpu(model).endpoint

    async def run(partition: str) -> tuple[list[int], torch.Tensor]:
        async with asynctsqp.Engine.connect(model, endpoint, partition=partition) as engine:
            tokens = await answer(engine)
            return tokens, await engine.logits(PROMPT + tokens)

    for partition in LADDER:
        tokens, scores = asyncio.run(run(partition))
        assert tokens == reference(model, PROMPT, FEW_TOKENS), partition
        assert (scores - scores_of(model, PROMPT + tokens)).abs().max() < 2e-4, partition


def test_the_demo_model_gives_the_same_tokens_on_every_rung(demo_model: Path) -> None:
    async def answers(partition: str, transport: str, count: int) -> list[list[int]]:
        async with asynctsqp.Engine.launch(demo_model, partition=partition, transport=transport) as engine:
            return [
                (await engine.complete(prompt, max_new_tokens=FEW_TOKENS, temperature=0)).token_ids
                for prompt in prompts[:count]
            ]

    prompts = DEMO_PROMPTS[:1] + DEMO_PROMPTS[-1:]
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    expected = [reference(demo_model, encode(tokenizer, prompt), FEW_TOKENS) for prompt in prompts]
    for partition, transport, count in [
        ("per-op", "msgpack", 1),  # the long one takes these a minute; benchmarks.ladder compares one of 1024 tokens
        ("batched", "binary", 1),
        ("fused", "shm", 2),
        ("fused-layer", "shm", 2),
    ]:
        assert asyncio.run(answers(partition, transport, count)) == expected[:count], partition


@pytest.mark.parametrize(("partition", "transport"), list(product(PARTITIONS, ["shm", "binary", "msgpack"])))
def test_blocks_chunks_and_transports_change_nothing(
    partition: str, transport: str, tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]
) -> None:
    """Slots so small that every large call is cut, and a prompt in several chunks."""
    model = tiny_model("gqa")
    small = {"slot_bytes": 256 << 10, "chunk_tokens": 37}

    async def run() -> tuple[list[int], torch.Tensor]:
        async with asynctsqp.Engine.connect(
            model, tiny_gpu.endpoint, partition=partition, transport=transport, **small
        ) as engine:
            return await answer(engine), await engine.logits(PROMPT)

    tokens, scores = asyncio.run(run())
    assert tokens == reference(model, PROMPT, FEW_TOKENS)
    assert (scores - scores_of(model, PROMPT)).abs().max() < 2e-4


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near(
    dtype: str, partition: str, tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]
) -> None:
    """As near to float32 as transformers' own half precision: at most twice its error."""
    model = tiny_model("gqa")

    async def run() -> torch.Tensor:
        async with asynctsqp.Engine.connect(model, tiny_gpu.endpoint, partition=partition, dtype=dtype) as engine:
            return await engine.logits(PROMPT)

    exact = scores_of(model, PROMPT)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))(torch.tensor([PROMPT]))
    their_error = (theirs.logits[0].float() - exact).abs().mean()
    assert (asyncio.run(run()) - exact).abs().mean() <= 2 * their_error


def calls_of_one_pass(model: Path, *flags: str) -> int:
    ended = run_tee(
        "--model", str(model), "--prompt", "Count.", "--max-new-tokens", "1", "--lanes", "1", "--json", *flags
    )
    assert ended.returncode == 0, ended.stderr
    return int(json.loads(ended.stdout)["rpc"]["calls"])


@pytest.mark.parametrize(
    ("layers", "partition", "calls"),
    [
        (22, "per-op", 9 * 22 + 2),
        (16, "batched", 6 * 16 + 2),
        (16, "shielded", 4 * 16 + 1),
        (16, "fused", 2 * 16 + 1),
        (16, "fused-layer", 16 + 2),
    ],
)
def test_one_pass_takes_the_calls_of_its_partition(
    layers: int, partition: str, calls: int, tiny_model: Callable[[str], Path]
) -> None:
    assert calls_of_one_pass(tiny_model(f"{layers}-layers"), "--partition", partition) == calls


def test_parts_of_a_linear_are_asked_for_at_once(tiny_model: Callable[[str], Path]) -> None:
    """A GPU side that answers none of q, k, v before it has all three; the same for gate and up."""
    model = tiny_model("gqa")
    layouts = Layouts(ModelSpec.read(model / "config.json"), torch.float32)
    waiting: dict[Op, Any] = {}

    def together(call: Any) -> list[list[Any]]:
        waiting[Op(call.op)] = call
        siblings = next((parts for parts in PARTS.values() if call.op in parts), (Op(call.op),))
        if not all(op in waiting for op in siblings):
            return []
        return [zeros(waiting.pop(op)) for op in siblings]

    def zeros(call: Any) -> list[Any]:
        return [Done(call.call_id, 0.0, 0.0), bytes(layouts.of(Op(call.op), call.rows, call.keys).output_bytes)]

    async def run(endpoint: str) -> list[int]:
        options: dict[str, Any] = {"partition": "per-op", "transport": "binary", "lanes": 1}
        async with asynctsqp.Engine.connect(model, endpoint, **options) as engine:
            return await asyncio.wait_for(answer(engine, tokens=2), 20)

    with lying_gpu({Call: together}) as gpu:
        assert asyncio.run(run(gpu.endpoint)) == [0, 0]


def test_what_a_partition_shows_is_said_in_one_line(tiny_model: Callable[[str], Path]) -> None:
    for partition in ("per-op", "shielded", "fused"):
        ended = run_tee(
            "--model", str(tiny_model("1-layers")), "--prompt", "a", "--max-new-tokens", "1", "--partition", partition
        )
        warnings = [line for line in ended.stderr.splitlines() if "warning" in line]
        assert len(warnings) == 1
        assert ("token ids" in warnings[0]) == (Op.EMBEDDING in OPERATIONS[partition])
        assert ("--partition" in warnings[0]) == (partition != "shielded")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"compress": "lz4", "transport": "shm"}, ("--compress", "--transport shm")),
        ({"protect": "mask", "partition": "fused"}, ("--protect mask", "--partition shielded")),
        ({"protect": "full", "partition": "per-op"}, ("--protect full", "--partition shielded")),
        ({"protect": "mask", "compress": "zstd", "transport": "binary"}, ("--compress", "--protect mask")),
        ({"shm_name": "/a", "transport": "msgpack"}, ("--shm-name", "--transport msgpack")),
        ({"doorbell": "on", "transport": "binary"}, ("--doorbell on", "--transport binary")),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(asynctsqp.BadInputError) as caught:
        EngineOptions(**options)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


def test_compression_through_shared_memory_is_refused_when_that_is_found(
    tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]
) -> None:
    ended = run_tee("--model", str(tiny_model("gqa")), "--gpu", tiny_gpu.endpoint, "--prompt", "a", "--compress", "lz4")
    assert ended.returncode == 2
    assert "--compress lz4 cannot help" in ended.stderr


@pytest.mark.parametrize(("compress", "transport"), list(product(["lz4", "zstd"], ["binary", "msgpack"])))
def test_compressed_tensors_are_the_same_tensors(
    compress: str, transport: str, tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]
) -> None:
    """The scores of 400 tokens against 400: 2.5 MB a call, of which half is zeros after the softmax."""
    model, tokens = tiny_model("gqa"), [1, *range(100, 499)]

    async def run(**options: Any) -> torch.Tensor:
        options |= {"partition": "batched", "transport": transport}
        async with asynctsqp.Engine.connect(model, tiny_gpu.endpoint, **options) as engine:
            return await engine.logits(tokens)

    assert torch.equal(asyncio.run(run(compress=compress)), asyncio.run(run()))


@pytest.mark.parametrize("token", [-1, 49152, 2**62])
def test_a_token_outside_the_vocabulary_is_refused(
    token: int, tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]
) -> None:
    with raw_tee(tiny_gpu.endpoint) as peer:
        assert peer.greet(tiny_model("gqa"), partition="per-op")[0] == WELCOME
        embed = call(op=Op.EMBEDDING, layer=0, rows=2)
        ids = lambda *values: torch.tensor(values).numpy().tobytes()  # noqa: E731
        assert peer.ask(embed, ids(0, token))[0][0] == REFUSED
        assert peer.ask(embed, ids(0, 49151))[0][0] == DONE


def test_keys_that_no_slot_holds_are_refused_before_the_first_token(
    tiny_model: Callable[[str], Path],
) -> None:
    async def run() -> None:
        options: dict[str, Any] = {"partition": "batched", "slot_bytes": 200 << 10}
        async with asynctsqp.Engine.launch(tiny_model("1-layers"), **options) as engine:
            with pytest.raises(asynctsqp.BadInputError, match="--slot-bytes"):
                await engine.complete([1] * 10, max_new_tokens=3000)
            assert len(await answer(engine, tokens=4)) == 4

    asyncio.run(run())
