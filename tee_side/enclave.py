"""The operations of one forward pass that stay inside, whatever the partition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from asynctsqp.errors import EngineClosed
from asynctsqp.limits import DECODE_ROWS
from asynctsqp.model_spec import ModelSpec
from tee_side import attention, few_rows, many_rows
from tee_side.arrays import Rows, Tokens
from tee_side.attention import Attend, Run, Steps, is_small
from tee_side.decode_attention import DecodeAttention
from tee_side.kv_cache import KVCache, Span
from tee_side.pace import Pace
from tee_side.rope import Angles, Rope
from tee_side.weights import Weights


class Kernels(Protocol):
    """few_rows.py or many_rows.py."""

    def rms_norm(self, x: Rows, weight: Rows, epsilon: float) -> Rows: ...
    def silu_mul(self, gate_up: Rows) -> Rows: ...
    def rotate(self, x: Rows, cos: Rows, sin: Rows) -> Rows: ...
    def add(self, x: Rows, y: Rows) -> Rows: ...
    def put(self, room: Rows, x: Rows) -> None: ...


class RunningSequence:
    """What a running sequence keeps between forward passes."""

    def __init__(self, cache: KVCache, rope: Rope) -> None:
        self.cache = cache
        self.rope = rope


@dataclass(frozen=True, eq=False)
class _Part:
    """The rows of one sequence. wanted: how many, from the last one backwards, the scores are wanted of.

    runs: the keys and values that they see, of all layers.
    """

    cache: KVCache
    span: Span
    rows: slice
    wanted: int
    runs: Sequence[Run]

    def past(self, layer: int) -> list[Run]:
        return [(keys[layer], values[layer]) for keys, values in self.runs]

    @property
    def decodes(self) -> bool:
        """Whether it is the next token of an answer, with a small past."""
        return self.span.length == 1 == self.wanted and is_small(self.past(0))


class Enclave:
    """One micro-batch: some next tokens of one sequence, or of several, and what partitions do with them.

    Rows are [n, features], one a token, a sequence's rows together. Heads are grouped by the key head that they share:
    [kv_heads, group, n, head_dim].
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        parts: Sequence[tuple[RunningSequence, int]],
        wanted: Tokens,
        pace: Pace,
        attend: Attend,
    ) -> None:
        """parts: sequences, and how many tokens of each are next. Their places in the KV caches are taken here.

        wanted: indices of the rows after which scores are wanted: of each sequence its last ones, or none.
        """
        self.layers = range(spec.layers)
        self._spec = spec
        self._weights = weights
        self._pace = pace
        self._attend = attend
        self._parts: list[_Part] = []
        angles: list[Angles] = []
        start = 0
        for sequence, length in parts:
            span = sequence.cache.extend(length)
            angles.append(sequence.rope.angles(span.position, length))
            end = start + length
            last = int(((wanted >= start) & (wanted < end)).sum())
            self._parts.append(_Part(sequence.cache, span, slice(start, end), last, sequence.cache.runs(span)))
            start = end
        decoding = [part for part in self._parts if part.decodes]
        self._others = [part for part in self._parts if not part.decodes]
        self._decoding_rows = [part.rows.start for part in decoding]
        group = spec.heads // spec.kv_heads
        self._decoding = DecodeAttention([part.runs for part in decoding], group) if decoding else None
        self._cos: Rows
        self._sin: Rows
        self._cos, self._sin = angles[0] if len(angles) == 1 else map(np.concatenate, zip(*angles, strict=True))
        self._wanted = None if len(wanted) == start else wanted
        self._kernels: Kernels = few_rows if start <= DECODE_ROWS else many_rows

    def fail(self, failure: Exception) -> None:
        """The pass has failed: later ones over the same sequences are of no use."""
        for part in self._parts:
            part.cache.fail(failure)

    def embed(self, tokens: Tokens) -> Rows:
        """-> [n, hidden]."""
        return self._weights.embed(tokens)

    def attention_norm(self, layer: int, x: Rows) -> Rows:
        return self._kernels.rms_norm(x, self._weights.layers[layer].attention, self._spec.rms_norm_eps)

    def mlp_norm(self, layer: int, x: Rows) -> Rows:
        return self._kernels.rms_norm(x, self._weights.layers[layer].mlp, self._spec.rms_norm_eps)

    def final_norm(self, x: Rows) -> Rows:
        return self._kernels.rms_norm(x, self._weights.final_norm, self._spec.rms_norm_eps)

    def silu_mul(self, gate_up: Rows) -> Rows:
        """gate | up: [n, 2 * intermediate] -> silu(gate) * up."""
        return self._kernels.silu_mul(gate_up)

    def add(self, x: Rows, y: Rows) -> Rows:
        """The residual stream, in place."""
        return self._kernels.add(x, y)

    def wanted(self, x: Rows) -> Rows:
        """Of all rows, those after which scores are wanted."""
        return x if self._wanted is None else x[self._wanted]

    def needed(self, layer: int, x: Rows) -> Rows:
        """Of all rows, those that the rest of a layer is needed for, after its keys and values."""
        return self.wanted(x) if layer == self.layers[-1] else x

    async def attend(self, layer: int, qkv: Rows) -> Rows:
        """q | k | v: [n, (heads + 2 kv_heads) * head_dim] -> context [needed, heads * head_dim]."""
        q, k, v = self.rotate(qkv)
        contexts: Rows = np.empty(q.shape, np.float32)
        failed = [part for part in self._parts if not await self._store(layer, part, k, v)]
        async with self._pace.long():
            if self._decoding is not None:
                steps = self._decoding.attend(layer, q[self._decoding_rows])
                contexts[self._decoding_rows] = await self._context(steps)
            for part in self._others:
                if part not in failed:
                    rows, (*before, own) = self._asked(layer, part), part.past(layer)
                    steps = self._attend(q[rows], before, own, self._pace.is_alone)
                    self._kernels.put(contexts[rows], await self._context(steps))
        for part in failed:  # nobody will ask for it, and the neighbours are not concerned; yet it leaves
            contexts[part.rows] = 0
        needed = self.needed(layer, contexts)
        return needed.reshape(len(needed), self._spec.q_features)

    def _asked(self, layer: int, part: _Part) -> slice:
        """The rows of a part that attention is needed for."""
        length = part.wanted if layer == self.layers[-1] else part.span.length
        return slice(part.rows.stop - length, part.rows.stop)

    async def _context(self, steps: Steps) -> Rows:
        """What attention's steps come to, with turns for others in between."""
        while (context := self.attention(steps)) is None:
            await self._pace.breathe()
        await self._pace.breathe()
        return context

    async def _store(self, layer: int, part: _Part, k: Rows, v: Rows) -> bool:
        """Of all tokens' new keys and values, those of one sequence, when it is their turn. -> whether it came."""
        if not await part.cache.turn(layer, part.span):
            return False
        part.cache.store(layer, part.span, k[:, part.rows], v[:, part.rows])
        return True

    async def attend_elsewhere(self, layer: int, qkv: Rows) -> tuple[Rows, Rows, Rows]:
        """`attend`'s first part, for a single sequence -> what QK and AV need: q, keys and values of all so far."""
        q, k, v = self.rotate(qkv)
        (part,) = self._parts
        if not await self._store(layer, part, k, v):
            raise EngineClosed("an earlier part of the prompt has failed")
        past = part.past(layer)
        keys, values = past[0] if len(past) == 1 else (np.concatenate(each, axis=1) for each in zip(*past, strict=True))
        return q.reshape(len(q), self._spec.kv_heads, -1, self._spec.head_dim).transpose(1, 2, 0, 3), keys, values

    def softmax(self, scores: Rows) -> Rows:
        """q k^T of all keys: [kv_heads, group, n, keys] -> probabilities."""
        return attention.probabilities(scores, self._spec.head_dim)

    def rows(self, context: Rows) -> Rows:
        """[kv_heads, group, n, head_dim] -> [n, heads * head_dim]."""
        return context.transpose(2, 0, 1, 3).reshape(context.shape[2], -1)

    def rotate(self, qkv: Rows) -> tuple[Rows, Rows, Rows]:
        """-> q [n, heads, head_dim], k and v [kv_heads, n, head_dim], the first two with their angles."""
        spec = self._spec
        heads = qkv.reshape(len(qkv), -1, spec.head_dim)
        q_and_k = self._kernels.rotate(heads[:, : spec.heads + spec.kv_heads], self._cos, self._sin)
        k, v = q_and_k[:, spec.heads :], heads[:, spec.heads + spec.kv_heads :]
        return q_and_k[:, : spec.heads], k.transpose(1, 0, 2), v.transpose(1, 0, 2)

    def attention(self, steps: Steps) -> Rows | None:
        """The next step; the last gives the context, like its queries."""
        return next(steps)
