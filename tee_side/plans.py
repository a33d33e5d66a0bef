"""How a call of some size goes out: in one block, or cut by rows into several that fit a slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from asynctsqp.errors import BadInputError
from asynctsqp.layouts import Area, Layout, Layouts, most_rows
from asynctsqp.model_spec import Op
from tee_side.arrays import Array, Rows

AnyArray = TypeVar("AnyArray", Rows, Array)


@dataclass(frozen=True, slots=True)
class Block:
    """Some rows of a call."""

    part: slice
    layout: Layout

    @property
    def rows(self) -> int:
        return int(self.part.stop) - int(self.part.start)


@dataclass(frozen=True, slots=True)
class Plan:
    """A call's blocks, in the order of their rows."""

    whole: Layout
    keys: int
    blocks: tuple[Block, ...]

    def outputs(self) -> tuple[Rows, ...]:
        """Room for the answer."""
        return tuple([np.empty(area.shape, np.float32) for area in self.whole.outputs])


class Plans:
    """All plans of one session: of its layouts, and its slots' size."""

    def __init__(self, layouts: Layouts, slot_bytes: int) -> None:
        self._layouts = layouts
        self._slot_bytes = slot_bytes
        self._kept: dict[tuple[Op, int], Plan] = {}  # of decode steps, by rows

    def of(self, op: Op, inputs: Sequence[Array]) -> Plan:
        """Raises BadInputError where not even one row fits a slot."""
        known = self._kept.get((op, len(inputs[0])))
        if known is not None:
            return known
        rows, keys = (inputs[0].shape[2], inputs[1].shape[1]) if op in (Op.QK, Op.AV) else (len(inputs[0]), 0)
        whole = self._layouts.of(op, rows, keys)
        plan = self._make(op, rows, keys, whole)
        if whole.reused:
            self._kept[op, rows] = plan
        return plan

    def _make(self, op: Op, rows: int, keys: int, whole: Layout) -> Plan:
        if whole.slot_bytes <= self._slot_bytes:
            return Plan(whole, keys, (Block(slice(0, rows), whole),))
        layout_of = partial(self._layouts.of, op, keys=keys)
        most = most_rows(layout_of, self._slot_bytes, rows)
        if most == 0:
            raise BadInputError("one row of a call does not fit a slot: use a larger --slot-bytes, or fewer tokens")
        size = -(-rows // -(-rows // most))  # nearly equal blocks, none above `most` rows
        parts = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
        return Plan(whole, keys, tuple(Block(part, layout_of(part.stop - part.start)) for part in parts))


def cut(areas: tuple[Area, ...], arrays: tuple[AnyArray, ...], part: slice) -> tuple[AnyArray, ...]:
    """What of each array belongs to some of the rows: views."""
    return tuple(
        array if area.row_dim is None else array[(slice(None),) * area.row_dim + (part,)]
        for area, array in zip(areas, arrays, strict=True)
    )
