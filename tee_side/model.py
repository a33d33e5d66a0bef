"""Read this first: a LLaMA's forward pass, from token ids to logits, with its linears somewhere else."""

from __future__ import annotations

from functools import partial

import torch
from transformers import LlamaConfig

from asynctsqp.model_spec import ModelSpec, Op
from asynctsqp.operators import rms_norm, rotate
from tee_side.kv_cache import KVCache, Span
from tee_side.partitions import Gpu, Partition
from tee_side.rope import Rope
from tee_side.weights import Weights


class Sequence:
    """What a running sequence keeps between forward passes."""

    def __init__(self, cache: KVCache, config: LlamaConfig) -> None:
        self.cache = cache
        self.rope = Rope(config)


class Model:
    """The TEE side's half of a LLaMA."""

    def __init__(self, spec: ModelSpec, weights: Weights, partition: Partition) -> None:
        self._spec = spec
        self._weights = weights
        self._partition = partition

    async def forward(self, tokens: torch.Tensor, sequence: Sequence, gpu: Gpu) -> torch.Tensor:
        """tokens: [n] int64, the next ones of the sequence -> their last hidden states [n, hidden] float32."""
        span = sequence.cache.extend(len(tokens))
        cos, sin = sequence.rope.angles(span.position, span.length)
        attend = partial(self._attend, sequence.cache, span, cos, sin)
        x = self._weights.embed(tokens)
        for layer, norms in enumerate(self._weights.layers):
            x = await self._partition(gpu, norms, layer, self._spec.rms_norm_eps, x, attend)
        return x

    async def logits(self, x: torch.Tensor, gpu: Gpu) -> torch.Tensor:
        """x: [n, hidden], the rows that are wanted -> [n, vocab] float32."""
        return await gpu.linear(Op.LM_HEAD, 0, rms_norm(x, self._weights.final_norm, self._spec.rms_norm_eps))

    def _attend(
        self, cache: KVCache, span: Span, cos: torch.Tensor, sin: torch.Tensor, layer: int, qkv: torch.Tensor
    ) -> torch.Tensor:
        spec = self._spec
        heads = qkv.view(span.length, spec.heads + 2 * spec.kv_heads, spec.head_dim)
        q_and_k = rotate(heads[:, : spec.heads + spec.kv_heads], cos, sin)
        v = heads[:, spec.heads + spec.kv_heads :]
        return cache.attend(layer, span, q_and_k[:, : spec.heads], q_and_k[:, spec.heads :], v)
