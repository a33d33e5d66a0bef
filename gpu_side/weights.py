"""The weights of a checkpoint, fused and cast, as the GPU side computes with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.layouts import OPERATIONS
from asynctsqp.model_spec import PARTS, LinearSpec, Op
from asynctsqp.tensor_codec import WIRE_DTYPES
from gpu_side import memory


@dataclass(frozen=True)
class Linear:
    """weight: [out_features, in_features]; bias: [out_features] or None; one dtype, one device."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`product`, into a tensor of its own."""
        out = torch.empty(len(x), len(self.weight), dtype=x.dtype, device=x.device)
        self.product(x, out)
        return out

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


@dataclass(frozen=True)
class Norms:
    """One layer's RMSNorm weights: [hidden] float32 each."""

    attention: torch.Tensor
    mlp: torch.Tensor


class Weights:
    """Everything of one checkpoint in one dtype on one device."""

    def __init__(self, checkpoint: Checkpoint, dtype: str, device: torch.device) -> None:
        """Reads and fuses all linears: seconds to minutes. Peak memory is the result and one tensor.

        Raises BadInputError before that where it does not fit.
        """
        memory.check(checkpoint, memory.linear_parameters(checkpoint.spec), WIRE_DTYPES[dtype], device)
        self._checkpoint = checkpoint
        self._dtype = WIRE_DTYPES[dtype]
        self._device = device
        spec = checkpoint.spec
        self._linears = {
            (op, layer): self._load(linear, layer)
            for op, linear in spec.linears.items()
            for layer in range(spec.layers_of(op))
        }
        for whole, parts in PARTS.items():
            for layer in range(spec.layers):
                self._linears |= _split(self._linears[whole, layer], parts, spec.linears[whole], layer)
        self.norms = tuple(
            Norms(self._norm(layer, "input_layernorm"), self._norm(layer, "post_attention_layernorm"))
            for layer in range(spec.layers)
        )
        self._embedding = self._linears[Op.LM_HEAD, 0].weight if spec.tied_embedding else None
        _finish_copies(device)

    def linear(self, op: Op, layer: int) -> Linear:
        """Raises KeyError where the model has no such linear."""
        return self._linears[op, layer]

    @property
    def embedding(self) -> torch.Tensor:
        """[vocab, hidden]. Raises KeyError where it was not prepared."""
        if self._embedding is None:
            raise KeyError("embedding")
        return self._embedding

    def prepare(self, partition: str) -> None:
        """Reads what only this partition needs; not for the event loop. Raises BadInputError where it does not fit."""
        spec = self._checkpoint.spec
        if Op.EMBEDDING in OPERATIONS[partition] and self._embedding is None:
            memory.check(self._checkpoint, spec.vocab_size * spec.hidden_size, self._dtype, self._device)
            self._embedding = self._checkpoint.read("model.embed_tokens.weight").to(self._device, self._dtype)
            _finish_copies(self._device)

    def _norm(self, layer: int, name: str) -> torch.Tensor:
        return self._checkpoint.read(f"model.layers.{layer}.{name}.weight").to(self._device, torch.float32)

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


def _finish_copies(device: torch.device) -> None:
    """The streams that will read the weights do not wait for the one that wrote them."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _split(whole: Linear, parts: tuple[Op, ...], spec: LinearSpec, layer: int) -> dict[tuple[Op, int], Linear]:
    """The parts of a fused linear: views of its rows."""
    rows = [size for _, size in spec.parts]
    weights = whole.weight.split(rows)
    biases = [None] * len(parts) if whole.bias is None else list(whole.bias.split(rows))
    return {(op, layer): Linear(weight, bias) for op, weight, bias in zip(parts, weights, biases, strict=True)}
