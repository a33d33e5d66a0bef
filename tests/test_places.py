"""How tensors cross the border: whole words on their boundaries, one pass, and nothing of the neighbours."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from asynctsqp.layouts import Area
from tee_side.places import FEW_ELEMENTS, places_in, shared_places_in

SHAPES = [(1, 8), (1, 7), (3, 5), (2, 7), (16, 33), (FEW_ELEMENTS // 64 + 1, 64), (FEW_ELEMENTS // 63 + 2, 63), (1, 1)]
GUARD = 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("make", [places_in, shared_places_in])
def test_what_goes_in_comes_out_and_touches_nothing_else(
    make: type, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Oracle: the plain bytes. Behind the area at most the rest of its last word is written, with zeros."""
    count = math.prod(shape)
    area = Area(shape, dtype, 0, GUARD)
    memory = bytearray(b"\xaa" * (area.end + 2 * GUARD))
    (place,) = make(memoryview(memory), (area,))
    kind = np.int32 if dtype is torch.int32 else np.float32
    x = np.arange(count, dtype=kind).reshape(shape) % 200
    place.write(x)
    travelled = torch.frombuffer(memory, dtype=dtype, count=count, offset=GUARD).to(torch.from_numpy(x).dtype)
    assert torch.equal(travelled.view(shape), torch.from_numpy(x))
    assert memory[:GUARD] == b"\xaa" * GUARD
    behind = memory[area.end :].lstrip(b"\x00")
    assert len(memory) - area.end - len(behind) < 8
    assert set(behind) == {0xAA}
    y = np.empty(shape, kind)
    place.read(y)
    assert np.array_equal(x, y)


@pytest.mark.parametrize("shape", SHAPES)
def test_shared_memory_is_touched_by_words(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every view of the shared memory that is made covers whole words, or is copied in one piece of whole words."""
    views: list[tuple[int, int, torch.dtype]] = []
    real = torch.frombuffer

    def frombuffer(buffer: memoryview, *, dtype: torch.dtype, count: int, offset: int) -> torch.Tensor:
        views.append((offset, count * dtype.itemsize, dtype))
        return real(buffer, dtype=dtype, count=count, offset=offset)

    monkeypatch.setattr(torch, "frombuffer", frombuffer)
    area = Area(shape, torch.int32, 0, GUARD)
    shared_places_in(memoryview(bytearray(area.end + GUARD)), (area,))
    for offset, size, dtype in views:
        assert offset % 8 == size % 8 == 0
        assert dtype is torch.int64


@pytest.mark.parametrize("columns", [256, 512])  # FEW_ELEMENTS in all, which numpy reads, and twice as many
def test_every_bfloat16_there_is_comes_out_as_torch_has_it(columns: int) -> None:
    """Infinities, numbers too small for an exponent, and whatever is not a number included."""
    every = np.tile(np.arange(1 << 16, dtype=np.uint16), columns // 256).reshape(-1, columns)
    (place,) = places_in(memoryview(bytearray(every.tobytes())), (Area(every.shape, torch.bfloat16, 0, 0),))
    y = np.empty(every.shape, np.float32)
    place.read(y)
    expected = torch.from_numpy(every).view(torch.bfloat16).float().numpy()
    assert np.array_equal(y.view(np.uint32), expected.view(np.uint32))
