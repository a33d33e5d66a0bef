"""Integer weights and products mod 2^32 against Python's integers and float64."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asynctsqp.errors import BadInputError, CheckpointError
from asynctsqp.quantize import Quantized
from asynctsqp.ring import COLUMNS, CUDA_SIZES, Ring, RingWeight

CPU = torch.device("cpu")
LEAST, MOST = -(2**31), 2**31 - 1
WRONG_ISA = "AVX512_CORE"  # without VNNI


def ring_of(integer: bool) -> Ring:
    """Whatever this machine is faster with."""
    ring = Ring(CPU, [])
    ring.integer = integer
    return ring


INTEGER, FLOAT64 = ring_of(True), ring_of(False)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every machine: so that the kernel's being right decides."""
    monkeypatch.setattr(Ring, "_is_fast", lambda _: True)


def python_product(x: torch.Tensor, weights: torch.Tensor) -> np.ndarray:
    """x W^T mod 2^32 by Python's own integers, as int32. weights: any integers."""
    exact = x.numpy().astype(object) @ weights.numpy().astype(object).T
    return ((exact + 2**31) % 2**32 - 2**31).astype(np.int32)


def words(shape: tuple[int, int], seed: int, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "ends":
        return torch.tensor([LEAST, MOST, 0, -1], dtype=torch.int32)[torch.randint(4, shape, generator=generator)]
    return torch.randint(LEAST, MOST + 1, shape, generator=generator).to(torch.int32)


def weights_of(digits: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(digits.shape[1:], dtype=torch.int64)
    for digit in digits:
        total = total * 128 + digit
    return total


@settings(max_examples=120, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(1, 2),
    st.integers(0, 10**6),
    st.sampled_from(["all", "ends"]),
    st.sampled_from([127, 1]),
)
@pytest.mark.parametrize("ring", [INTEGER, FLOAT64], ids=["integer", "float64"])
def test_products_are_those_of_the_integers(
    ring: Ring, n: int, width: int, rows: int, digits: int, seed: int, kind: str, step: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = (torch.randint(-127 // step, 127 // step + 1, (digits, rows, width), generator=generator) * step).to(
        torch.int8
    )
    x = words((n, width), seed, kind)
    out = torch.full((n, rows + 3), 7, dtype=torch.int32)  # a view, as of a slot: nothing around it is touched
    made = ring.product(x, RingWeight(weights, CPU), out[:, 1 : rows + 1])
    np.testing.assert_array_equal(made.numpy(), python_product(x, weights_of(weights)))
    assert (out[:, 0] == 7).all()
    assert (out[:, rows + 1 :] == 7).all()


@pytest.mark.parametrize(("rows", "width"), [(11, 13), (960, 576), (8200, 8)])
@pytest.mark.parametrize("n", [1, 5, 9])
def test_what_cuda_asks_of_its_operands(monkeypatch: pytest.MonkeyPatch, rows: int, width: int, n: int) -> None:
    """Its documented limits, on a kernel of the CPU: more than 16 rows, K and N multiples of 8."""
    right = torch._int_mm

    def strict(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert len(a) > 16
        assert a.shape[1] % 8 == 0
        assert b.shape[1] % 8 == 0
        return right(a, b)

    monkeypatch.setattr(torch, "_int_mm", strict)
    monkeypatch.setattr("asynctsqp.ring.CPU_SIZES", CUDA_SIZES)
    ring = ring_of(True)
    digits = torch.randint(-127, 128, (2, rows, width), generator=torch.Generator().manual_seed(n)).to(torch.int8)
    x = words((n, width), n, "all")
    made = ring.product(x, RingWeight(digits, CPU), torch.empty(n, rows, dtype=torch.int32))
    np.testing.assert_array_equal(made.numpy(), python_product(x, weights_of(digits)))


@pytest.mark.parametrize("word", [LEAST, MOST, -1, 0x7F7F7F7F, 0x808080, -0x808080])
@pytest.mark.parametrize("weight", [127, -127])
def test_the_largest_sums_of_a_large_matrix(word: int, weight: int) -> None:
    width = 14336
    digits = torch.full((1, 24, width), weight, dtype=torch.int8)
    x = torch.full((2, width), word, dtype=torch.int32)
    made = INTEGER.product(x, RingWeight(digits, CPU), torch.empty(2, 24, dtype=torch.int32))
    expected = (word * weight * width + 2**31) % 2**32 - 2**31
    assert (made == expected).all()


def test_more_rows_and_columns_than_one_tile_holds() -> None:
    digits = torch.randint(-127, 128, (1, 20_003, 24), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    x = words((700, 24), 1, "all")
    made = INTEGER.product(x, RingWeight(digits, CPU), torch.empty(700, 20_003, dtype=torch.int32))
    exact = x.double() @ digits[0].double().T  # below 2^43
    np.testing.assert_array_equal(made.numpy(), (exact.long() & 0xFFFFFFFF).numpy().astype(np.uint32).view(np.int32))


def test_wide_rows_in_float64() -> None:
    """Where one float64 sum of a whole row would no longer be exact."""
    digits = torch.full((1, 2, 70_000), 127, dtype=torch.int8)
    x = torch.full((1, 70_000), MOST, dtype=torch.int32)
    x[0, ::2] -= 1
    made = FLOAT64.product(x, RingWeight(digits, CPU), torch.empty(1, 2, dtype=torch.int32))
    expected = 127 * (35_000 * MOST + 35_000 * (MOST - 1))
    assert (made == (expected + 2**31) % 2**32 - 2**31).all()


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("count", [1, 2, 5, 16, 256])
def test_a_wrong_kernel_is_noticed_at_every_number_of_rows(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    right = torch._int_mm

    def saturating(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return right(a, b).clamp_(-1_100_000, 1_100_000) if len(a) == 4 * count else right(a, b)

    monkeypatch.setattr(torch, "_int_mm", saturating)
    ring = Ring(CPU, [(96, 128), (64, 64)])
    assert not ring.integer
    x, digits = words((2, 128), 3, "all"), torch.full((1, 96, 128), -127, dtype=torch.int8)
    made = ring.product(x, RingWeight(digits, CPU), torch.empty(2, 96, dtype=torch.int32))
    np.testing.assert_array_equal(made.numpy(), python_product(x, digits[0]))


@pytest.mark.usefixtures("fast")
def test_a_wrong_kernel_is_noticed_in_the_last_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary is cut into tiles, and the last one has a shape of its own."""
    right = torch._int_mm

    def wrong(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return right(a, b).add_(1) if b.shape[1] == 40 else right(a, b)

    monkeypatch.setattr(torch, "_int_mm", wrong)
    assert Ring(CPU, [(COLUMNS, 16), (2 * COLUMNS + 48, 16)]).integer
    assert not Ring(CPU, [(2 * COLUMNS + 40, 16)]).integer


@pytest.mark.usefixtures("fast")
def test_a_missing_kernel_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("no _int_mm here")

    monkeypatch.setattr(torch, "_int_mm", missing)
    assert not Ring(CPU, [(64, 64)]).integer


@pytest.mark.parametrize("slow", ["integer", "float64"])
def test_the_slower_kernel_is_not_used(monkeypatch: pytest.MonkeyPatch, slow: str) -> None:
    """As torch's loop is on processors without a kernel: whatever this one has, the other takes longer."""
    name = {"integer": "_integer", "float64": "_float"}[slow]
    right = getattr(Ring, name)

    def delayed(self: Ring, x: torch.Tensor, weight: RingWeight, out: torch.Tensor) -> None:
        time.sleep(0.05)
        right(self, x, weight, out)

    monkeypatch.setattr(Ring, name, delayed)
    assert Ring(CPU, []).integer == (slow != "integer")


PROBE = """
import json, torch
from asynctsqp.ring import Ring, RingWeight
a = torch.randint(-128, 128, (16, 576), generator=torch.Generator().manual_seed(1)).to(torch.int8)
b = torch.randint(-127, 128, (576, 960), generator=torch.Generator().manual_seed(2)).to(torch.int8)
right = torch.equal(torch._int_mm(a, b).double(), a.double() @ b.double())
Ring._is_fast = lambda _: True  # being right decides
ring = Ring(torch.device("cpu"), [(960, 576)])
x = torch.randint(-(1 << 31), 1 << 31, (3, 576), generator=torch.Generator().manual_seed(3)).to(torch.int32)
weight = RingWeight(b.t().contiguous()[None], torch.device("cpu"))
y = ring.product(x, weight, torch.empty(3, 960, dtype=torch.int32))
exact = (x.double() @ b.double()).long().to(torch.int32)
print(json.dumps([right, ring.integer, torch.equal(y, exact)]))
"""


@pytest.mark.parametrize("isa", ["DEFAULT", WRONG_ISA])
def test_instruction_sets_whose_int8_products_saturate(isa: str) -> None:
    """Whatever this machine's kernel does, the ring says so and its products are right."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, timeout=60)
    kernel_right, integer, right = json.loads(done.stdout)
    assert right
    assert integer == kernel_right
    machine = Path("/proc/cpuinfo")
    if isa == WRONG_ISA and machine.exists() and "avx512_vnni" in machine.read_text():
        assert not integer, "the instruction set that should give wrong products did not: this test shows nothing"


def by_definition(weight: torch.Tensor, largest: int) -> tuple[list[list[int]], list[float]]:
    """Scales and integers by numpy's float32 and exact fractions."""
    rows, scales = [], []
    for row in weight.float().numpy():
        scale = np.abs(row).max() / np.float32(largest)
        assert scale.dtype == np.float32
        quotients = [np.float32(value) / scale for value in row]
        rows.append([round(Fraction(float(quotient))) for quotient in quotients])  # Python rounds half to even
        scales.append(float(scale))
    return rows, scales


@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (12, 2047)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_divided_and_rounded_as_ieee_says(bits: int, largest: int, dtype: torch.dtype) -> None:
    weight = torch.randn(40, 56, generator=torch.Generator().manual_seed(bits)).to(dtype)
    weight[3] = torch.arange(56) - 27.5  # ties once divided by a scale of a power of two
    weight[3, 0] = largest
    made = Quantized.of(weight, bits)
    rows, scales = by_definition(weight, largest)
    assert weights_of(made.digits).tolist() == rows
    assert made.scales.tolist() == scales
    assert max(abs(value) for row in rows for value in row) == largest


@pytest.mark.parametrize("bits", [8, 12])
def test_threads_blocks_and_stacking_change_no_bit(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    weight = torch.randn(1500, 300, generator=torch.Generator().manual_seed(5)).bfloat16()

    def digest(quantized: Quantized) -> bytes:
        made = hashlib.sha256()
        quantized.hash_into(made)
        return made.digest()

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = digest(Quantized.of(weight, bits))
        torch.set_num_threads(3)
        assert digest(Quantized.of(weight, bits)) == one
        monkeypatch.setattr("asynctsqp.quantize.BLOCK", 7 * 300)
        assert digest(Quantized.of(weight, bits)) == one
    finally:
        torch.set_num_threads(before)
    parts = [Quantized.of(part, bits) for part in weight.split([700, 501, 299])]
    assert digest(Quantized.stack(parts)) == one
    changed = weight.clone()
    changed[1499, 299] *= 1.5
    assert digest(Quantized.of(changed, bits)) != one


def test_rows_of_nothing_or_almost_nothing() -> None:
    weight = torch.zeros(3, 8)
    weight[1] = 1e-44
    weight[2] = torch.finfo(torch.float32).max
    made = Quantized.of(weight)
    assert made.digits[0].tolist() == [[0] * 8, [0] * 8, [127] * 8]
    assert made.scales.isfinite().all()
    assert Quantized.of(torch.zeros(3, 8)).norm() == 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused(bad: float) -> None:
    weight = torch.ones(4, 8)
    weight[2, 5] = bad
    with pytest.raises(CheckpointError, match="not finite"):
        Quantized.of(weight)


def test_other_widths_are_refused() -> None:
    with pytest.raises(BadInputError, match="--weight-bits"):
        Quantized.of(torch.ones(2, 2), bits=4)


@pytest.mark.parametrize("bits", [8, 12])
def test_the_norm_is_that_of_the_largest_row(bits: int) -> None:
    made = Quantized.of(torch.randn(50, 40, generator=torch.Generator().manual_seed(2)), bits)
    exact = weights_of(made.digits).double().square().sum(dim=1).max().sqrt()
    assert made.norm() == pytest.approx(float(exact), rel=1e-14)
