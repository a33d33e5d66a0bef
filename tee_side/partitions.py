"""How a forward pass is split between the two sides. Each function is the whole pass, as straight-line code.

A partition gets the enclave's operations, the GPU side, and the tokens; it gives the last hidden states of those after
which scores are wanted, [wanted, hidden]. The last layer has the keys and values of all tokens, and nothing else of a
token whose scores nobody wants; only the first two partitions, which stand for an older system, compute all of it.

Only `shielded` can be masked: the others show the GPU side more than linears, and exist to measure what each step of
the way is worth.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

import numpy as np

from asynctsqp.model_spec import PARTS, Op
from tee_side.arrays import Array, Rows, Tokens
from tee_side.enclave import Enclave


class Gpu(Protocol):
    """What a partition may ask of the GPU side."""

    async def linear(self, op: Op, layer: int, x: Array) -> Rows:
        """An operation with one input, [rows, in_features] (or token ids), and one output."""

    async def call(self, op: Op, layer: int, *inputs: Array) -> tuple[Rows, ...]:
        """Any operation; asynctsqp/layouts.py has the shapes."""


Partition = Callable[[Enclave, Gpu, Tokens], Awaitable[Rows]]


async def per_op(tee: Enclave, gpu: Gpu, tokens: Tokens) -> Rows:
    """Nine calls a layer: every product by itself, attention's too; embedding and scores leave."""
    x = await gpu.linear(Op.EMBEDDING, 0, tokens)
    for layer in tee.layers:
        normed = tee.attention_norm(layer, x)
        qkv = await asyncio.gather(*(gpu.linear(op, layer, normed) for op in PARTS[Op.QKV]))
        context = await _attend_elsewhere(tee, gpu, layer, np.concatenate(qkv, axis=1))
        x = tee.add(x, await gpu.linear(Op.O, layer, context))
        normed = tee.mlp_norm(layer, x)
        gate_up = await asyncio.gather(*(gpu.linear(op, layer, normed) for op in PARTS[Op.GATE_UP]))
        x = tee.add(x, await gpu.linear(Op.DOWN, layer, tee.silu_mul(np.concatenate(gate_up, axis=1))))
    return tee.wanted(x)


async def batched(tee: Enclave, gpu: Gpu, tokens: Tokens) -> Rows:
    """Six calls a layer: linears that share their input are one."""
    x = await gpu.linear(Op.EMBEDDING, 0, tokens)
    for layer in tee.layers:
        qkv = await gpu.linear(Op.QKV, layer, tee.attention_norm(layer, x))
        context = await _attend_elsewhere(tee, gpu, layer, qkv)
        x = tee.add(x, await gpu.linear(Op.O, layer, context))
        gate_up = await gpu.linear(Op.GATE_UP, layer, tee.mlp_norm(layer, x))
        x = tee.add(x, await gpu.linear(Op.DOWN, layer, tee.silu_mul(gate_up)))
    return tee.wanted(x)


async def shielded(tee: Enclave, gpu: Gpu, tokens: Tokens) -> Rows:
    """Four linears a layer on the GPU; embedding, attention, KV cache and everything non-linear never leave."""
    x = tee.embed(tokens)
    for layer in tee.layers:
        qkv = await gpu.linear(Op.QKV, layer, tee.attention_norm(layer, x))
        x, context = tee.needed(layer, x), await tee.attend(layer, qkv)
        if not len(x):
            break
        x = tee.add(x, await gpu.linear(Op.O, layer, context))
        gate_up = await gpu.linear(Op.GATE_UP, layer, tee.mlp_norm(layer, x))
        x = tee.add(x, await gpu.linear(Op.DOWN, layer, tee.silu_mul(gate_up)))
    return x


async def fused(tee: Enclave, gpu: Gpu, tokens: Tokens) -> Rows:
    """Two calls a layer; only embedding, attention and KV cache stay. The residual stream travels with the call."""
    x = tee.embed(tokens)
    for layer in tee.layers:
        qkv = await gpu.linear(Op.NORM_QKV, layer, x)
        x, context = tee.needed(layer, x), await tee.attend(layer, qkv)
        if not len(x):
            break
        (x,) = await gpu.call(Op.O_MLP, layer, x, context)
    return x


async def fused_layer(tee: Enclave, gpu: Gpu, tokens: Tokens) -> Rows:
    """One call a layer: all that lies between two attentions."""
    x = tee.embed(tokens)
    qkv = await gpu.linear(Op.NORM_QKV, 0, x)
    for layer in tee.layers[:-1]:
        x, qkv = await gpu.call(Op.LAYER, layer, x, await tee.attend(layer, qkv))
    last = tee.layers[-1]
    x, context = tee.needed(last, x), await tee.attend(last, qkv)
    if len(x):
        (x,) = await gpu.call(Op.O_MLP, last, x, context)
    return x


async def _attend_elsewhere(tee: Enclave, gpu: Gpu, layer: int, qkv: Rows) -> Rows:
    q, keys, values = await tee.attend_elsewhere(layer, qkv)
    (scores,) = await gpu.call(Op.QK, layer, q, keys)
    (context,) = await gpu.call(Op.AV, layer, tee.softmax(scores), values)
    return tee.rows(context)


PARTITIONS: dict[str, Partition] = {
    "per-op": per_op,
    "batched": batched,
    "shielded": shielded,
    "fused": fused,
    "fused-layer": fused_layer,
}
