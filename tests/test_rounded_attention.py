"""A prompt's attention in bfloat16 against the textbook's formula, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tee_side import rounded_attention
from tee_side.arrays import Rows
from tee_side.attention import Run, attend
from tee_side.rounded_attention import FEWEST, QUERIES, attend_rounded, attention_in
from tests import textbook
from tests.textbook import last

HEAD_DIM = 16
UNIT = 2.0**-8  # what bfloat16 rounds a number by, at most, as a part of it


def made(queries: int, lengths: Sequence[int], kv_heads: int, group: int, seed: int) -> tuple[Rows, list[Run]]:
    """Numbers that bfloat16 holds, so that what is compared is the arithmetic."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Rows:
        return torch.randn(shape, generator=generator).bfloat16().float().numpy()

    runs = [(random(kv_heads, n, HEAD_DIM), random(kv_heads, n, HEAD_DIM)) for n in lengths]
    return random(queries, kv_heads * group, HEAD_DIM), runs


@settings(max_examples=40, deadline=None)
@given(
    queries=st.integers(FEWEST, 3 * QUERIES),
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 3), (4, 2)]),
    seed=st.integers(0, 1000),
)
def test_it_is_the_textbook_as_far_as_bfloat16_goes(
    queries: int, lengths: list[int], heads: tuple[int, int], seed: int
) -> None:
    lengths[-1] = max(lengths[-1], queries)
    q, runs = made(queries, lengths, *heads, seed)
    given_q = q.copy()
    found = last(attend_rounded(q, runs[:-1], runs[-1], whole=True))
    expected, largest = textbook.attention(q, runs), textbook.scores(q, runs).abs().max()
    # a query and a score are rounded, which is the relative error of a weight; then the weight, and the result
    allowed = UNIT * (2 * float(largest) + 4) * max(1.0, float(expected.abs().max()))
    assert found.dtype == np.float32
    assert (torch.from_numpy(found) - expected).abs().max() < allowed
    assert (q == given_q).all()


@pytest.mark.parametrize("changed", [0, 1, QUERIES - 1, QUERIES, QUERIES + 1, 2 * QUERIES + 9])
def test_no_token_sees_a_later_one(changed: int) -> None:
    """To the bit: what a later token has for key and value changes nothing for those before it."""
    tokens = 2 * QUERIES + 10
    q, (run,) = made(tokens, [tokens], 2, 2, seed=1)
    before = last(attend_rounded(q, [], run, whole=True))
    run[0][:, changed] += 3
    run[1][:, changed] += 3
    after = last(attend_rounded(q, [], run, whole=True))
    assert (after[:changed] == before[:changed]).all()
    assert (after[changed] != before[changed]).any()


@pytest.mark.parametrize(("queries", "most"), [(FEWEST - 1, None), (40, 100)])
def test_few_queries_and_long_pasts_are_left_to_the_other_way(
    queries: int, most: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """most: scores at a time; where they are of too few queries, writing them down is not worth it."""
    if most is not None:
        monkeypatch.setattr(rounded_attention, "SCORES", most)
    q, (run,) = made(queries, [50], 2, 2, seed=2)
    assert (last(attend_rounded(q, [], run, whole=True)) == last(attend(q, [], run, whole=True))).all()


def test_scores_are_never_more_than_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    softmax = torch.softmax

    def watched(scores: torch.Tensor, **options: object) -> torch.Tensor:
        seen.append(scores.numel())
        return softmax(scores, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(rounded_attention.torch, "softmax", watched)
    monkeypatch.setattr(rounded_attention, "SCORES", 50_000)
    q, (run,) = made(300, [400], 2, 2, seed=3)
    found = last(attend_rounded(q, [], run, whole=True))
    assert max(seen) <= 50_000
    assert len(seen) > 3
    assert (torch.from_numpy(found) - textbook.attention(q, [run])).abs().max() < 0.1


@pytest.mark.parametrize("supported", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32])
def test_only_bfloat16_is_rounded_to_it_and_only_where_a_processor_multiplies_it(
    dtype: torch.dtype, supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    expected = attend_rounded if dtype == torch.bfloat16 and supported else attend
    assert attention_in(dtype) is expected
