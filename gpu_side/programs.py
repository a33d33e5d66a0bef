"""What each operation computes: short functions over a model's weights.

The shapes of their inputs and outputs are in asynctsqp/layouts.py; the non-linear parts are in
asynctsqp/operators.py.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch

from asynctsqp.errors import CallRefused
from asynctsqp.model_spec import ModelSpec, Op
from asynctsqp.operators import rms_norm, silu_mul
from gpu_side.executor import Program, Tensors
from gpu_side.weights import Linear, Weights


class Programs(Protocol):
    """What the clients of one arithmetic may ask for."""

    def of(self, op: Op, layer: int) -> Program:
        """op: one of the client's partition; layer: one that the model has."""


class FloatPrograms:
    """All operations of one model in one dtype."""

    def __init__(self, spec: ModelSpec, weights: Weights) -> None:
        self._spec = spec
        self._weights = weights

    def of(self, op: Op, layer: int) -> Program:
        """op: one that the weights were prepared for; layer: one that the model has."""
        match op:
            case Op.EMBEDDING:
                return self._embed
            case Op.QK:
                return _scores
            case Op.AV:
                return _context
            case Op.NORM_QKV:
                return partial(self._norm_qkv, layer)
            case Op.O_MLP:
                return partial(self._o_mlp, layer)
            case Op.LAYER:
                return partial(self._layer, layer)
        return partial(_linear, self._weights.linear(op, layer))

    def _embed(self, inputs: Tensors, outputs: Tensors) -> None:
        torch.index_select(self._weights.embedding, 0, inputs[0], out=outputs[0])

    def _norm_qkv(self, layer: int, inputs: Tensors, outputs: Tensors) -> None:
        x = self._norm(inputs[0], self._weights.norms[layer].attention)
        self._weights.linear(Op.QKV, layer).product(x, outputs[0])

    def _o_mlp(self, layer: int, inputs: Tensors, outputs: Tensors) -> None:
        linear = self._weights.linear
        x, context = inputs
        x = x + linear(Op.O, layer)(context)
        gate_up = linear(Op.GATE_UP, layer)(self._norm(x, self._weights.norms[layer].mlp))
        torch.add(x, linear(Op.DOWN, layer)(silu_mul(gate_up)), out=outputs[0])

    def _layer(self, layer: int, inputs: Tensors, outputs: Tensors) -> None:
        x, qkv = outputs
        self._o_mlp(layer, inputs, (x,))
        self._norm_qkv(layer + 1, (x,), (qkv,))

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x.float(), weight, self._spec.rms_norm_eps).to(x.dtype)


def _linear(linear: Linear, inputs: Tensors, outputs: Tensors) -> None:
    linear.product(inputs[0], outputs[0])


def _scores(inputs: Tensors, outputs: Tensors) -> None:
    """q k^T. The query heads that share a key head are rows of one product."""
    q, k = inputs
    torch.bmm(q.flatten(1, 2), k.mT, out=outputs[0].flatten(1, 2))


def _context(inputs: Tensors, outputs: Tensors) -> None:
    """probabilities v."""
    shares, v = inputs
    torch.bmm(shares.flatten(1, 2), v, out=outputs[0].flatten(1, 2))


def check_tokens(tokens: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """A copy of the ids that is within the vocabulary, whatever the client does to the original meanwhile.

    Raises CallRefused otherwise: on a CUDA device an index out of range would end the process.
    """
    copy = tokens.clone()
    if int(copy.min()) < 0 or int(copy.max()) >= vocab_size:
        raise CallRefused("there is no such token")
    return copy
