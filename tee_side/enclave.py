"""The operations of one forward pass that stay inside, whatever the partition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from asynctsqp import operators
from asynctsqp.errors import EngineClosed
from asynctsqp.model_spec import ModelSpec
from tee_side.kv_cache import KVCache, Span
from tee_side.rope import Angles, Rope
from tee_side.weights import Weights


class RunningSequence:
    """What a running sequence keeps between forward passes."""

    def __init__(self, cache: KVCache, rope: Rope) -> None:
        self.cache = cache
        self.rope = rope


@dataclass(frozen=True)
class _Part:
    """The rows of one sequence."""

    cache: KVCache
    span: Span
    rows: slice


class Enclave:
    """One micro-batch: some next tokens of one sequence, or of several, and what partitions do with them.

    Rows are [n, features] float32, one a token, a sequence's rows together. Heads are grouped by the key head that
    they share: [kv_heads, group, n, head_dim].
    """

    def __init__(self, spec: ModelSpec, weights: Weights, parts: Sequence[tuple[RunningSequence, int]]) -> None:
        """parts: sequences, and how many tokens of each are next. Their places in the KV caches are taken here."""
        self.layers = range(spec.layers)
        self._spec = spec
        self._weights = weights
        self._parts: list[_Part] = []
        angles: list[Angles] = []
        start = 0
        for sequence, length in parts:
            span = sequence.cache.extend(length)
            angles.append(sequence.rope.angles(span.position, length))
            self._parts.append(_Part(sequence.cache, span, slice(start, start + length)))
            start += length
        self._cos, self._sin = angles[0] if len(angles) == 1 else map(torch.cat, zip(*angles, strict=True))

    def fail(self, failure: Exception) -> None:
        """The pass has failed: later ones over the same sequences are of no use."""
        for part in self._parts:
            part.cache.fail(failure)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: [n] int64 -> [n, hidden]."""
        return self._weights.embed(tokens)

    def attention_norm(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        return operators.rms_norm(x, self._weights.layers[layer].attention, self._spec.rms_norm_eps)

    def mlp_norm(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        return operators.rms_norm(x, self._weights.layers[layer].mlp, self._spec.rms_norm_eps)

    def final_norm(self, x: torch.Tensor) -> torch.Tensor:
        return operators.rms_norm(x, self._weights.final_norm, self._spec.rms_norm_eps)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gate | up: [n, 2 * intermediate] -> silu(gate) * up."""
        return operators.silu_mul(gate_up)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The residual stream, in place."""
        return x.add_(y)

    async def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """q | k | v: [n, (heads + 2 kv_heads) * head_dim] -> context [n, heads * head_dim]."""
        q, k, v = self.rotate(qkv)
        contexts = []
        for part in self._parts:
            if await part.cache.turn(layer, part.span):
                contexts.append(self.attention(layer, part, q[part.rows], k[part.rows], v[part.rows]))
            else:  # nobody will ask for these rows any more; the neighbours' are not concerned
                contexts.append(q.new_zeros(part.span.length, self._spec.q_features))
        return contexts[0] if len(contexts) == 1 else torch.cat(contexts)

    async def attend_elsewhere(self, layer: int, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`attend`'s first part, for a single sequence -> what QK and AV need: q, keys and values of all so far."""
        q, k, v = self.rotate(qkv)
        (part,) = self._parts
        if not await part.cache.turn(layer, part.span):
            raise EngineClosed("an earlier part of the prompt has failed")
        part.cache.store(layer, part.span, k, v)
        keys, values = part.cache.past(layer, part.span)
        return self._grouped(q), keys, values

    def softmax(self, scores: torch.Tensor) -> torch.Tensor:
        """q k^T of all keys: [kv_heads, group, n, keys] -> probabilities; a token sees itself and those before it."""
        new, keys = scores.shape[2:]
        if new > 1:
            later = torch.ones(new, keys, dtype=torch.bool).triu(keys - new + 1)
            scores.masked_fill_(later, -math.inf)
        return torch.softmax(scores.mul_(self._spec.head_dim**-0.5), dim=-1)

    def rows(self, context: torch.Tensor) -> torch.Tensor:
        """[kv_heads, group, n, head_dim] -> [n, heads * head_dim]."""
        return context.permute(2, 0, 1, 3).reshape(context.shape[2], -1)

    def rotate(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """-> q [n, heads, head_dim], k and v [n, kv_heads, head_dim], the first two with their angles."""
        spec = self._spec
        heads = qkv.view(len(qkv), spec.heads + 2 * spec.kv_heads, spec.head_dim)
        q_and_k = operators.rotate(heads[:, : spec.heads + spec.kv_heads], self._cos, self._sin)
        return q_and_k[:, : spec.heads], q_and_k[:, spec.heads :], heads[:, spec.heads + spec.kv_heads :]

    def attention(self, layer: int, part: _Part, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Stores a sequence's new k and v, and attends to all its keys -> context [n, heads * head_dim]."""
        return part.cache.attend(layer, part.span, q, k, v)

    def _grouped(self, q: torch.Tensor) -> torch.Tensor:
        return q.view(len(q), self._spec.kv_heads, -1, self._spec.head_dim).permute(1, 2, 0, 3)
