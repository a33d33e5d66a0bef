"""From token ids to logits: read this first, then partitions.py."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from asynctsqp.errors import EngineClosed
from asynctsqp.model_spec import ModelSpec, Op
from tee_side.arrays import Rows, Tokens
from tee_side.attention import Attend
from tee_side.enclave import Enclave, RunningSequence
from tee_side.kv_cache import KVCache
from tee_side.llama_config import LlamaConfig
from tee_side.pace import Pace
from tee_side.partitions import Gpu, Partition
from tee_side.recorder import Recorder
from tee_side.rope import Ropes
from tee_side.weights import Weights


class Model:
    """The TEE side's half of a LLaMA."""

    def __init__(
        self,
        spec: ModelSpec,
        config: LlamaConfig,
        weights: Weights,
        partition: Partition,
        attend: Attend,
        pace: Pace,
        recorder: Recorder | None,
    ) -> None:
        self._spec = spec
        self._weights = weights
        self._partition = partition
        self._attend = attend
        self._ropes = Ropes(config)
        self._recorder = recorder
        self._pace = pace

    def sequence(self, cache: KVCache, prompt_tokens: int) -> RunningSequence:
        return RunningSequence(cache, self._ropes.for_sequence(prompt_tokens))

    def begin(self, parts: Sequence[tuple[RunningSequence, int]], wanted: Tokens, lane: int) -> Enclave:
        """A pass over the next tokens of some sequences. To be called in the order in which the tokens follow.

        wanted: indices of those after which the scores are wanted.
        """
        tee = Enclave(self._spec, self._weights, parts, wanted, self._pace, self._attend)
        if self._recorder is not None:
            self._recorder.watch(tee, lane)
        return tee

    async def forward(self, tee: Enclave, gpu: Gpu, tokens: Tokens) -> Rows:
        """tokens: as `begin` was told -> scores, [wanted, vocab]. Where none are wanted there is no call for them."""
        try:
            with self._pace.running(), np.errstate(all="ignore"):  # an overflow shows in the scores, which are checked
                x = await self._partition(tee, gpu, tokens)
                if not len(x):
                    return np.empty((0, self._spec.vocab_size), np.float32)
                return await gpu.linear(Op.LM_HEAD, 0, tee.final_norm(x))
        except BaseException as failure:
            tee.fail(failure if isinstance(failure, Exception) else EngineClosed("the pass was cancelled"))
            raise
        finally:
            if self._recorder is not None:
                self._recorder.unwatch(tee)
