"""The weights of a checkpoint, fused and cast, as the GPU side computes with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.layouts import OPERATIONS
from asynctsqp.model_spec import PARTS, LinearSpec, Op
from asynctsqp.tensor_codec import WIRE_DTYPES
from gpu_side import blocked, memory, widened


@dataclass(frozen=True)
class Linear:
    """weight: [out_features, in_features], as the device has it, or in oneDNN's blocked layout (blocked.py).

    bias: [out_features] or None; one dtype, one device. widen: products of many rows are made in float32 (widened.py).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    widen: bool = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`product`, into a tensor of its own."""
        out = torch.empty(len(x), len(self.weight), dtype=x.dtype, device=x.device)
        self.product(x, out)
        return out

    def product(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """x: [rows, in_features] -> out: [rows, out_features] = x W^T (+ bias)."""
        if self.weight.is_mkldnn:
            blocked.product(x, self.weight, self.bias, out)
        elif self.widen and len(x) >= widened.FEWEST_ROWS:
            widened.product(x, self.weight, self.bias, out)
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
        self._block = blocked.works(self._dtype, device)
        self._widen = widened.pays(self._dtype, device)
        self._linears = {
            (op, layer): self._load(linear, layer)
            for op, linear in spec.linears.items()
            for layer in range(spec.layers_of(op))
        }
        if self._block:
            for op in spec.linears:  # those of all layers have the same shape
                blocked.warm_up(self._linears[op, 0].weight, self._linears[op, 0].bias)
        self.norms = tuple(
            Norms(self._norm(layer, "input_layernorm"), self._norm(layer, "post_attention_layernorm"))
            for layer in range(spec.layers)
        )
        self._embedding = self._linears[Op.LM_HEAD, 0].weight if spec.tied_embedding and not self._block else None
        finish_copies(device)

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
        spec, operations = self._checkpoint.spec, OPERATIONS[partition]
        if Op.EMBEDDING in operations and self._embedding is None:
            memory.check(self._checkpoint, spec.vocab_size * spec.hidden_size, self._dtype, self._device)
            self._embedding = self._checkpoint.read("model.embed_tokens.weight").to(self._device, self._dtype)
        for whole, parts in PARTS.items():
            if operations.issuperset(parts) and (parts[0], 0) not in self._linears:
                self._load_parts(spec.linears[whole], parts)
        finish_copies(self._device)

    def _norm(self, layer: int, name: str) -> torch.Tensor:
        return self._checkpoint.read(f"model.layers.{layer}.{name}.weight").to(self._device, torch.float32)

    def _load(self, linear: LinearSpec, layer: int) -> Linear:
        weight = self._stack(linear, layer, ".weight", (linear.out_features, linear.in_features))
        bias = self._stack(linear, layer, ".bias", (linear.out_features,)) if linear.bias else None
        return Linear(blocked.of(weight) if self._block else weight, bias, self._widen)

    def _load_parts(self, linear: LinearSpec, parts: tuple[Op, ...]) -> None:
        """What a fused linear is made of, one by one: read again, for the partition that measures what fusing saves."""
        layers = range(self._checkpoint.spec.layers)
        parameters = len(layers) * linear.out_features * (linear.in_features + linear.bias)
        memory.check(self._checkpoint, parameters, self._dtype, self._device)
        for op, part in zip(parts, linear.parts, strict=True):
            alone = LinearSpec(linear.in_features, (part,), linear.bias)
            self._linears |= {(op, layer): self._load(alone, layer) for layer in layers}

    def _stack(self, linear: LinearSpec, layer: int, suffix: str, shape: tuple[int, ...]) -> torch.Tensor:
        stacked = torch.empty(shape, dtype=self._dtype, device=self._device)
        start = 0
        for part, rows in linear.parts:
            stacked[start : start + rows] = self._checkpoint.read(part.format(layer=layer) + suffix)
            start += rows
        return stacked


def finish_copies(device: torch.device) -> None:
    """The streams that will read the weights do not wait for the one that wrote them."""
    if device.type == "cuda":
        # not the device as a whole: that may not be waited for while another thread records a graph on it
        torch.cuda.current_stream(device).synchronize()
