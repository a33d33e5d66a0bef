"""Where the arrays of one call lie on their way: areas of a slot or of a message, in the dtype that travels.

Each gets an array cast in, or gives one cast out, in a single pass. What the other side can reach is seen through these
alone: no view of it is given out.
"""

from __future__ import annotations

import math
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from asynctsqp.layouts import Area
from tee_side.arrays import Array

FEW_ELEMENTS = 1 << 16  # up to which one thread copies faster than several
WORD_BYTES = 8

_NUMPY = {torch.float32: np.float32, torch.int32: np.int32, torch.int64: np.int64}  # the dtypes that travel as they are


class Place(Protocol):
    """One area."""

    def write(self, x: Array) -> None:
        """Casts x into it."""

    def read(self, y: Array) -> None:
        """Copies it into y: exactly one read of each byte."""


class _Few:
    """numpy's copy of a few elements that are not cast: the one call that all decode steps make."""

    def __init__(self, view: npt.NDArray[np.float32 | np.int32 | np.int64]) -> None:
        self._view = view

    def write(self, x: Array) -> None:
        np.copyto(self._view, x)

    def read(self, y: Array) -> None:
        np.copyto(y, self._view)


class _Many:
    """torch's copy, which casts, and uses several threads."""

    def __init__(self, view: torch.Tensor) -> None:
        self._view = view

    def write(self, x: Array) -> None:
        self._view.copy_(torch.from_numpy(x))

    def read(self, y: Array) -> None:
        torch.from_numpy(y).copy_(self._view)


class _FewRounded(_Many):
    """The same of a few elements in bfloat16, which are the upper halves of float32's words: numpy reads them.

    It has less code to fetch into the caches between two products than torch's cast has.
    """

    def __init__(self, view: torch.Tensor) -> None:
        super().__init__(view)
        self._halves = view.view(torch.uint16).numpy()

    def read(self, y: Array) -> None:
        words = y.view(np.uint32)
        np.copyto(words, self._halves)
        words <<= 16


class _Words:
    """torch's copy of many elements that are not cast, cut for its threads between words only."""

    def __init__(self, view: torch.Tensor) -> None:
        self._view = view  # [words] int64

    def write(self, x: Array) -> None:
        self._view.copy_(_as_words(x))

    def read(self, y: Array) -> None:
        _as_words(y).copy_(self._view)


class _Ragged:
    """What does not end on a word, through private memory."""

    def __init__(self, words: torch.Tensor, area: Area) -> None:
        self._words = words  # int64, over the area and the few bytes behind it
        self._area = area

    def write(self, x: Array) -> None:
        private = torch.zeros_like(self._words)
        self._in(private).copy_(torch.from_numpy(x))
        self._words.copy_(private)

    def read(self, y: Array) -> None:
        torch.from_numpy(y).copy_(self._in(self._words.clone()))

    def _in(self, words: torch.Tensor) -> torch.Tensor:
        return words.view(self._area.dtype)[: math.prod(self._area.shape)].view(self._area.shape)


Places: TypeAlias = tuple[Place, ...]


def places_in(memory: memoryview, areas: tuple[Area, ...]) -> Places:
    """areas: of a layout, from the first byte of `memory` on, which must be large enough."""
    return tuple(_place(memory, area) for area in areas)


def shared_places_in(memory: memoryview, areas: tuple[Area, ...]) -> Places:
    """The same in memory outside an enclave, which is read and written in whole 8-byte words on their boundaries.

    Intel's advisories SA-00657 (reads) and SA-00615 (writes) ask for that. Tensors that are cast on the way are not
    held to it: nothing that is masked or checked is.
    """
    return tuple(_shared_place(memory, area) for area in areas)


def _shared_place(memory: memoryview, area: Area) -> Place:
    size = area.end - area.offset
    if area.dtype not in _NUMPY or area.row_dim not in (0, None):
        return _place(memory, area)
    words = torch.frombuffer(memory, dtype=torch.int64, count=-(-size // WORD_BYTES), offset=area.offset)
    if size % WORD_BYTES:
        return _Ragged(words, area)
    return _place(memory, area) if math.prod(area.shape) <= FEW_ELEMENTS else _Words(words)


def _as_words(array: Array) -> torch.Tensor:
    """A contiguous array whose size is a multiple of words: a view. (Of any other, it would be one of a copy.)"""
    return torch.from_numpy(array.reshape(-1).view(np.int64))


def _place(memory: memoryview, area: Area) -> Place:
    count = math.prod(area.shape)
    if area.dtype in _NUMPY and count <= FEW_ELEMENTS:
        return _Few(np.frombuffer(memory, _NUMPY[area.dtype], count, area.offset).reshape(area.shape))
    view = torch.frombuffer(memory, dtype=area.dtype, count=count, offset=area.offset).view(area.shape)
    return _FewRounded(view) if area.dtype == torch.bfloat16 and count <= FEW_ELEMENTS else _Many(view)
