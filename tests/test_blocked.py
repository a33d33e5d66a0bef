"""Products from weights in oneDNN's layout, against float64; and that a wrong one is not used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.model_spec import Op
from gpu_side import blocked
from gpu_side.weights import Linear, Weights

CPU = torch.device("cpu")
DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if blocked.works(dtype, CPU)]


@pytest.mark.parametrize("rows", [1, 2, 3, 16, 17, 100, 1023, 1024, 2500])
@pytest.mark.parametrize("sizes", [(1, 1), (7, 5), (96, 64), (300, 576)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_that_of_float64(rows: int, sizes: tuple[int, int], bias: bool) -> None:
    if not DTYPES:
        pytest.skip("torch has no blocked products on this processor")
    for dtype in DTYPES:
        weight, x = torch.randn(sizes).to(dtype), torch.randn(rows, sizes[1]).to(dtype)
        linear = Linear(blocked.of(weight), torch.randn(sizes[0]).to(dtype) if bias else None)
        assert linear.weight.is_mkldnn
        exact = x.double() @ weight.double().t() + (0 if linear.bias is None else linear.bias.double())
        tolerance = 1e-4 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(linear(x).double(), exact, rtol=tolerance, atol=tolerance)


def _wrong(x: torch.Tensor, weight: torch.Tensor, bias: Any, out: torch.Tensor) -> None:
    out.copy_(x.float() @ weight.to_dense().float().t())  # without the bias


def _missing(weight: torch.Tensor) -> torch.Tensor:
    raise AttributeError("no such operator")


@pytest.mark.parametrize(("name", "broken"), [("product", _wrong), ("of", _missing)])
def test_what_does_not_work_is_not_used(
    name: str, broken: Any, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocked, name, broken)
    assert not blocked.works(torch.float32, CPU)
    directory: Path = tiny_model("gqa")
    weights = Weights(Checkpoint(directory), "float32", CPU)
    assert not weights.linear(Op.O, 0).weight.is_mkldnn


def test_other_dtypes_and_devices_are_left_alone() -> None:
    assert not blocked.works(torch.float16, CPU)
    assert not blocked.works(torch.float32, torch.device("cuda"))
