"""The linears of a checkpoint, fused and cast, as the GPU side computes with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.model_spec import LinearSpec, Op
from asynctsqp.tensor_codec import WIRE_DTYPES
from gpu_side import memory


@dataclass(frozen=True)
class Linear:
    """weight: [out_features, in_features]; bias: [out_features] or None; one dtype, one device."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def product(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """x: [rows, in_features] -> out: [rows, out_features] = x W^T (+ bias), with no copy in between."""
        if len(x) == 1:  # the matrix-vector kernels are up to twice as fast for a decode step
            x, out = x[0], out[0]
            if self.bias is None:
                torch.mv(self.weight, x, out=out)
            else:
                torch.addmv(self.bias, self.weight, x, out=out)
        elif self.bias is None:
            torch.mm(x, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, x, self.weight.t(), out=out)


class Weights:
    """Every linear of one checkpoint in one dtype on one device."""

    def __init__(self, checkpoint: Checkpoint, dtype: str, device: torch.device) -> None:
        """Reads and fuses all of it: seconds to minutes. Peak memory is the result and one tensor.

        Raises BadInputError before that where it does not fit.
        """
        memory.check(checkpoint, WIRE_DTYPES[dtype], device)
        self._checkpoint = checkpoint
        self._dtype = WIRE_DTYPES[dtype]
        self._device = device
        spec = checkpoint.spec
        self._linears = {
            (op, layer): self._load(linear, layer)
            for op, linear in spec.linears.items()
            for layer in range(spec.layers_of(op))
        }

    def linear(self, op: Op, layer: int) -> Linear:
        """Raises KeyError where the model has no such linear."""
        return self._linears[op, layer]

    def _load(self, linear: LinearSpec, layer: int) -> Linear:
        weight = self._stack(linear, layer, ".weight", (linear.out_features, linear.in_features))
        bias = self._stack(linear, layer, ".bias", (linear.out_features,)) if linear.bias else None
        return Linear(weight, bias)

    def _stack(self, linear: LinearSpec, layer: int, suffix: str, shape: tuple[int, ...]) -> torch.Tensor:
        stacked = torch.empty(shape, dtype=self._dtype, device=self._device)
        start = 0
        for part, rows in linear.parts:
            stacked[start : start + rows] = self._checkpoint.read(part.format(layer=layer) + suffix)
            start += rows
        return stacked
