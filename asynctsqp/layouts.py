"""The tensors of one call: their shapes, and where they lie in a slot or a message.

Both sides make this table from the checkpoint's own config.json and from a call's two sizes, `rows` and `keys`.
The tensors of a call lie one after another, each on a boundary of 64 bytes.

    rows    tokens that the call is about; a large call is cut along them
    keys    tokens that those attend to, in QK and AV; 0 in all other calls

Query heads that share a key head are a group: heads = kv_heads * group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from asynctsqp.limits import MOST_PORTIONS
from asynctsqp.model_spec import PARTS, ModelSpec, Op

ALIGNMENT = 64  # a cache line, and enough for every vector instruction

_LINEARS = frozenset({Op.QKV, Op.O, Op.GATE_UP, Op.DOWN})
_ATTENTION = frozenset({Op.QK, Op.AV})

# What each partition asks for; the GPU side answers nothing else.
OPERATIONS: dict[str, frozenset[Op]] = {
    "per-op": frozenset({Op.O, Op.DOWN, *PARTS[Op.QKV], *PARTS[Op.GATE_UP], *_ATTENTION, Op.EMBEDDING, Op.LM_HEAD}),
    "batched": _LINEARS | _ATTENTION | {Op.EMBEDDING, Op.LM_HEAD},
    "shielded": _LINEARS | {Op.LM_HEAD},
    "fused": frozenset({Op.NORM_QKV, Op.O_MLP, Op.LM_HEAD}),
    "fused-layer": frozenset({Op.NORM_QKV, Op.LAYER, Op.O_MLP, Op.LM_HEAD}),
}


@dataclass(frozen=True)
class Area:
    """One tensor: `row_dim` is the dimension that counts the call's rows, or None if it goes whole with each block."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    row_dim: int | None
    offset: int  # bytes

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Layout:
    """What goes in and what comes out of one call, each side from byte 0 of its area."""

    inputs: tuple[Area, ...]
    outputs: tuple[Area, ...]
    input_bytes: int
    output_bytes: int
    reused: bool  # the same object for every call of this operation and size

    @property
    def slot_bytes(self) -> int:
        """What a slot must hold for it."""
        return max(self.input_bytes, self.output_bytes)


_Tensor = tuple[tuple[int, ...], int | None]  # shape, row_dim


class Layouts:
    """All layouts of one model in one dtype."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype) -> None:
        self._spec = spec
        self.dtype = dtype
        self._reused: dict[tuple[Op, int], Layout] = {}

    def of(self, op: Op, rows: int, keys: int) -> Layout:
        """Raises ValueError for sizes that the operation cannot have."""
        if rows < 1 or (keys < 1) == (op in _ATTENTION) or keys < 0:
            raise ValueError(f"{op.name} of {rows} rows and {keys} keys")
        if keys or rows > MOST_PORTIONS:
            return self._make(op, rows, keys, reused=False)
        if (op, rows) not in self._reused:
            self._reused[op, rows] = self._make(op, rows, keys, reused=True)
        return self._reused[op, rows]

    def _make(self, op: Op, rows: int, keys: int, reused: bool) -> Layout:
        inputs, outputs = _tensors(self._spec, op, rows, keys)
        first_dtype = torch.int64 if op is Op.EMBEDDING else self.dtype
        laid_in, laid_out = _lay(inputs, first_dtype), _lay(outputs, self.dtype)
        return Layout(laid_in, laid_out, laid_in[-1].end, laid_out[-1].end, reused)


def _lay(tensors: list[_Tensor], dtype: torch.dtype) -> tuple[Area, ...]:
    areas: list[Area] = []
    offset = 0
    for shape, row_dim in tensors:
        areas.append(Area(shape, dtype, row_dim, offset))
        offset = -(-areas[-1].end // ALIGNMENT) * ALIGNMENT
    return tuple(areas)


def _tensors(spec: ModelSpec, op: Op, rows: int, keys: int) -> tuple[list[_Tensor], list[_Tensor]]:
    """Inputs and outputs of one operation."""

    def flat(features: int) -> _Tensor:
        return (rows, features), 0

    def by_head(features: int) -> _Tensor:
        return (spec.kv_heads, spec.heads // spec.kv_heads, rows, features), 2

    past: _Tensor = (spec.kv_heads, keys, spec.head_dim), None
    x, qkv, context = flat(spec.hidden_size), flat(spec.q_features + 2 * spec.kv_features), flat(spec.q_features)
    match op:
        case Op.EMBEDDING:
            return [((rows,), 0)], [x]
        case Op.QK:
            return [by_head(spec.head_dim), past], [by_head(keys)]
        case Op.AV:
            return [by_head(keys), past], [by_head(spec.head_dim)]
        case Op.NORM_QKV:
            return [x], [qkv]
        case Op.O_MLP:
            return [x, context], [x]
        case Op.LAYER:
            return [x, context], [x, qkv]
    in_features, out_features = _features(spec, op)
    return [flat(in_features)], [flat(out_features)]


def _features(spec: ModelSpec, op: Op) -> tuple[int, int]:
    """Of a linear or of a part of one."""
    for whole, parts in PARTS.items():
        if op in parts:
            linear = spec.linears[whole]
            return linear.in_features, linear.parts[parts.index(op)][1]
    return spec.linears[op].in_features, spec.linears[op].out_features


def tensors_in(buffer: memoryview, areas: tuple[Area, ...]) -> tuple[torch.Tensor, ...]:
    """The tensors that lie in `buffer`: views, no copy. The buffer must be large enough."""
    return tuple(
        torch.frombuffer(buffer, dtype=area.dtype, count=math.prod(area.shape), offset=area.offset).view(area.shape)
        for area in areas
    )


def most_rows(layout_of: Callable[[int], Layout], slot_bytes: int, rows: int) -> int:
    """How many of `rows` rows fit a slot; 0 if none does. The bytes of a call grow with its rows."""
    if layout_of(rows).slot_bytes <= slot_bytes:
        return rows
    low, high = 0, rows  # fits (or is nothing); does not fit
    while high - low > 1:
        middle = (low + high) // 2
        if layout_of(middle).slot_bytes <= slot_bytes:
            low = middle
        else:
            high = middle
    return low
