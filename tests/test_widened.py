"""Products of 16-bit weights made in float32, against float64; and where they are made so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.model_spec import Op
from gpu_side import blocked, widened
from gpu_side.weights import Linear, Weights

CPU = torch.device("cpu")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SIZES = [(1, 1), (7, 5), (300, 576), (2000, 576)]


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [*((rows, sizes) for rows in (1, 9, 100) for sizes in SIZES), (2, (3, widened.WEIGHTS + 8))],
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values())
def test_a_product_is_float64_s_rounded_once(rows: int, sizes: tuple[int, int], bias: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, weight = made(rows, sizes[1]), made(*sizes)
    linear = Linear(weight, made(sizes[0]) if bias else None, widen=True)
    out = torch.full((rows, sizes[0]), float("nan"), dtype=dtype)
    widened.product(x, weight, linear.bias, out)
    exact = x.double() @ weight.double().t() + (0 if linear.bias is None else linear.bias.double())
    error = (out.double() - exact).abs()
    # half a unit in the last place, and what float32 sums of so many products may be off by
    rounding = torch.finfo(dtype).eps / 2 * exact.abs()
    sums = torch.finfo(torch.float32).eps * sizes[1] ** 0.5 * x.double().norm(dim=1, keepdim=True) * 4
    assert bool((error <= rounding + sums).all())
    if rows >= widened.FEWEST_ROWS:
        assert torch.equal(linear(x), out)


@pytest.mark.parametrize("name", DTYPES)
def test_it_is_for_processors_without_such_products(
    name: str, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory: Path = tiny_model("gqa")
    for lacking in (True, False):
        monkeypatch.setattr(widened, "pays", lambda dtype, device, lacking=lacking: lacking)
        monkeypatch.setattr(blocked, "works", lambda dtype, device: False)
        made: list[int] = []
        monkeypatch.setattr(widened, "product", lambda x, weight, bias, out, made=made: made.append(len(x)))
        linear = Weights(Checkpoint(directory), name, CPU).linear(Op.O, 0)
        for rows in (1, widened.FEWEST_ROWS - 1, widened.FEWEST_ROWS, 100):
            linear(torch.randn(rows, linear.weight.shape[1]).to(DTYPES[name]))
        assert made == ([widened.FEWEST_ROWS, 100] if lacking else [])


def test_float32_and_other_devices_are_left_alone() -> None:
    assert not widened.pays(torch.float32, CPU)
    assert not widened.pays(torch.bfloat16, torch.device("cuda"))


def test_the_processor_s_own_flags_decide() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    if "avx2" in flags and not {"avx512bw", "avx_ne_convert"} & set(flags):  # the least that oneDNN asks for
        assert widened.pays(torch.bfloat16, CPU)
    if "avx512_bf16" in flags:
        assert not widened.pays(torch.bfloat16, CPU)
