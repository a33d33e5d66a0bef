"""From token ids to logits: read this first, then partitions.py."""

from __future__ import annotations

import torch
from transformers import LlamaConfig

from asynctsqp.model_spec import ModelSpec, Op
from tee_side.enclave import Enclave, Sequence
from tee_side.kv_cache import KVCache
from tee_side.partitions import Gpu, Partition
from tee_side.recorder import Recorder
from tee_side.rope import Ropes
from tee_side.weights import Weights


class Model:
    """The TEE side's half of a LLaMA."""

    def __init__(
        self, spec: ModelSpec, config: LlamaConfig, weights: Weights, partition: Partition, recorder: Recorder | None
    ) -> None:
        self._spec = spec
        self._weights = weights
        self._partition = partition
        self._ropes = Ropes(config)
        self._recorder = recorder

    def sequence(self, cache: KVCache) -> Sequence:
        return Sequence(cache, self._ropes.for_sequence())

    async def forward(
        self, tokens: torch.Tensor, sequence: Sequence, gpu: Gpu, lane: int, wanted: slice
    ) -> torch.Tensor:
        """The next tokens of a sequence, [n] int64 -> the scores after those of them that are wanted, float32.

        An empty `wanted` costs no call for scores. lane: only for records.
        """
        tee = Enclave(self._spec, self._weights, sequence, len(tokens))
        if self._recorder is not None:
            self._recorder.watch(tee, lane)
        x = (await self._partition(tee, gpu, tokens))[wanted]
        if not len(x):
            return x.new_empty(0, self._spec.vocab_size)
        return await gpu.linear(Op.LM_HEAD, 0, tee.final_norm(x))
