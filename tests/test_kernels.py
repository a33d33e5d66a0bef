"""What the TEE side computes by itself, against transformers' own modules and the textbook, in float64."""

from __future__ import annotations

import asyncio
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from tee_side import attention, few_rows, many_rows
from tee_side.arrays import Rows
from tee_side.attention import Run, attend
from tee_side.decode_attention import DecodeAttention
from tee_side.model import Model
from tee_side.pace import Pace
from tee_side.rope import RopeTable
from tests import textbook
from tests.textbook import last

both = pytest.mark.parametrize("kernels", [few_rows, many_rows], ids=["few", "many"])
ROWS = [1, 2, 16, 17, 300]
HEAD_DIM = 8


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def near(found: Rows, expected: torch.Tensor, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    assert found.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(found).double(), expected.double(), rtol=rtol, atol=atol)


@both
@pytest.mark.parametrize("scale", [0.0, 1e-12, 1.0, 1e15])
@pytest.mark.parametrize("rows", ROWS)
def test_rms_norm(kernels: ModuleType, rows: int, scale: float) -> None:
    """Rows whose squares are far below epsilon, and far above what a half could hold."""
    norm = LlamaRMSNorm(48, eps=1e-5)
    norm.weight.data = random(48, seed=1)
    x = random(rows, 48) * scale
    with torch.no_grad():
        near(kernels.rms_norm(x.numpy(), norm.weight.numpy(), 1e-5), norm(x))


@both
@pytest.mark.parametrize("rows", ROWS)
def test_silu_mul(kernels: ModuleType, rows: int) -> None:
    """LlamaMLP, whose products are left out: what goes into `down` is what is compared."""
    gate_up = random(rows, 2 * 64) * 5
    mlp = LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=64))
    mlp.gate_proj = mlp.up_proj = mlp.down_proj = torch.nn.Identity()
    gate, up = gate_up.double().chunk(2, dim=-1)
    near(kernels.silu_mul(gate_up.numpy().copy()), mlp.act_fn(gate) * up)
    near(kernels.silu_mul(torch.cat([gate, gate], dim=-1).float().numpy()), mlp(gate))


@both
@pytest.mark.parametrize("rows", [1, 40])
def test_silu_mul_of_gates_beyond_the_exponential(kernels: ModuleType, rows: int) -> None:
    """exp(89) is more than a float32 holds, exp(-104) less: zero and the gate itself, and no nan."""
    gates = torch.tensor([-3e38, -1e30, -1000.0, -104, -89, -88, -87, -20, -0.0, 0, 20, 87, 89, 104, 1000, 1e30, 3e38])
    gate_up = torch.cat([gates, torch.full_like(gates, 0.5)]).repeat(rows, 1)
    with np.errstate(all="ignore"):  # as in a pass
        found = kernels.silu_mul(gate_up.numpy())
    assert np.isfinite(found).all()
    near(found, (torch.nn.functional.silu(gates.double()) * 0.5).repeat(rows, 1), atol=1e-36)


@both
def test_a_pass_does_not_warn_of_an_overflow_on_the_way_to_zero(kernels: ModuleType) -> None:
    """A warning is an error in these tests."""
    gate_up = np.full((1, 2), -1000, np.float32)

    async def partition(*_: object) -> Rows:
        await asyncio.sleep(0)
        return kernels.silu_mul(gate_up)[:0]  # and no scores are wanted

    none: Any = mock.Mock(vocab_size=1)
    model = Model(none, LlamaConfig(), none, partition, none, Pace(lambda: False), None)
    asyncio.run(model.forward(none, none, none))


@both
@pytest.mark.parametrize("rows", ROWS)
def test_rotate(kernels: ModuleType, rows: int) -> None:
    config = LlamaConfig(hidden_size=6 * HEAD_DIM, num_attention_heads=6, max_position_embeddings=4096)
    q, k = random(rows, 4, HEAD_DIM), random(rows, 2, HEAD_DIM, seed=1)
    positions = torch.arange(1000, 1000 + rows).unsqueeze(0)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions)
    in_heads = (x.transpose(0, 1).unsqueeze(0).double() for x in (q, k))
    expected = [x[0].transpose(0, 1) for x in apply_rotary_pos_emb(*in_heads, cos.double(), sin.double())]
    angles = RopeTable(config).angles(1000, rows)
    near(kernels.rotate(torch.cat([q, k], dim=1).numpy(), *angles), torch.cat(expected, dim=1))


@both
def test_add_is_in_place(kernels: ModuleType) -> None:
    x, y = random(20, 48), random(20, 48, seed=1)
    stream = x.numpy().copy()
    assert kernels.add(stream, y.numpy()) is stream
    near(stream, x + y)


def runs_of(lengths: list[int], kv_heads: int, seed: int, scale: float = 1.0) -> list[Run]:
    """Views of larger memory, as a block's runs are."""
    keys = (random(kv_heads, sum(lengths) + 64, HEAD_DIM, seed=seed) * scale).numpy()
    values = random(kv_heads, sum(lengths) + 64, HEAD_DIM, seed=seed + 1).numpy()
    ends = np.cumsum(lengths)
    return [(keys[:, end - n : end], values[:, end - n : end]) for n, end in zip(lengths, ends, strict=True)]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    queries=st.integers(1, 40),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 3), (4, 2)]),
    small=st.sampled_from([0, 1 << 30]),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    whole=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_attention_over_runs_is_the_textbook(
    lengths: list[int], queries: int, heads: tuple[int, int], small: int, scale: float, whole: bool, seed: int
) -> None:
    """One query in numpy (all is small) and by flash and merge (nothing is); several, of which the run has some."""
    kv_heads, group = heads
    lengths[-1] = max(lengths[-1], queries)
    runs = runs_of(lengths, kv_heads, seed, scale)
    q = (random(queries, kv_heads * group, HEAD_DIM, seed=seed + 2) * 2).numpy()
    given_q = q.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "SMALL", small)
        found = last(attend(q, runs[:-1], runs[-1], whole))
    # a score's rounding error grows with the score, and is the relative error of a weight
    near(found, textbook.attention(q, runs), rtol=1e-4, atol=1e-5 * max(1, scale))
    assert (q == given_q).all()


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_either_side_of_small_is_the_textbook(parts: int, beyond: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the size itself, whose other side is another way: the ways are counted."""
    ways: list[str] = []
    for name in ("_softmax_of_scores", "merge"):
        real = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda *a, real=real, name=name: ways.append(name) or real(*a))
    tokens = attention.SMALL // (2 * HEAD_DIM) + beyond
    lengths = [tokens // parts] * (parts - 1)
    runs = runs_of([*lengths, tokens - sum(lengths)], 2, seed=5)
    q = random(1, 6, HEAD_DIM, seed=7).numpy()
    near(last(attend(q, runs[:-1], runs[-1], whole=True)), textbook.attention(q, runs), rtol=1e-4, atol=1e-5)
    assert ways == ["merge" if beyond > 0 else "_softmax_of_scores"]


@pytest.mark.parametrize("lengths", [[40], [64, 90]])
def test_attention_by_key_heads_is_the_same_to_the_bit(lengths: list[int]) -> None:
    """And others may have a turn after each key head of each run: the past ones', its own, those of the queries."""
    runs = runs_of(lengths, 3, seed=8)
    q = random(40, 6, HEAD_DIM, seed=9).numpy()
    whole, *steps = attend(q, runs[:-1], runs[-1], whole=True), *attend(q, runs[:-1], runs[-1], whole=False)
    assert (last(whole) == last(iter(steps))).all()
    assert len(steps) == 3 * (1 if lengths == [40] else 3) + 1


def of_all_layers(*layers: list[Run]) -> list[Run]:
    """The runs of one sequence, as the KV cache has them."""
    return [tuple(map(np.stack, zip(*runs, strict=True))) for runs in zip(*layers, strict=True)]


@settings(max_examples=60, deadline=None)
@given(
    pasts=st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=3), min_size=1, max_size=11),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 3), (4, 2)]),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_one_query_of_each_sequence_is_as_if_it_were_alone_to_the_bit(
    pasts: list[list[int]], heads: tuple[int, int], scale: float, seed: int
) -> None:
    kv_heads, group = heads
    layers = [
        [runs_of(lengths, kv_heads, seed + 100 * layer + index, scale) for index, lengths in enumerate(pasts)]
        for layer in range(2)
    ]
    decoding = DecodeAttention([of_all_layers(*runs) for runs in zip(*layers, strict=True)], group)
    for layer, sequences in enumerate(layers):
        q = random(len(pasts), kv_heads * group, HEAD_DIM, seed=seed + layer).numpy()
        given_q = q.copy()
        found = last(decoding.attend(layer, q))
        for index, (*before, own) in enumerate(sequences):
            alone = last(attend(q[index : index + 1], before, own, whole=True))
            assert (found[index] == alone[0]).all()
        assert found.shape == q.shape
        assert (q == given_q).all()


def test_probabilities_are_the_textbooks() -> None:
    for new, keys in ((1, 1), (1, 50), (7, 7), (7, 50)):
        scores = random(2, 3, new, keys, seed=keys) * 20
        later = torch.ones(new, keys).triu(keys - new + 1).bool()
        expected = (scores.double() / HEAD_DIM**0.5).masked_fill(later, -torch.inf).softmax(-1)
        near(attention.probabilities(scores.numpy().copy(), HEAD_DIM), expected)
