"""The TEE side put together: from a prompt to pieces of text, any number of them at once."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.config import EngineOptions, SamplingOptions
from asynctsqp.errors import CheckpointError, PromptError, ProtocolError, one_line
from asynctsqp.layouts import OPERATIONS, Layouts
from asynctsqp.model_spec import Op
from asynctsqp.reports.clock import ClockOffset
from asynctsqp.tensor_codec import WIRE_DTYPES
from tee_side.enclave import Sequence as RunningSequence
from tee_side.kv_cache import KVCache, KVMemory
from tee_side.lanes import Lanes
from tee_side.link import Endpoint, Link
from tee_side.model import Model
from tee_side.offload import Offload
from tee_side.partitions import PARTITIONS
from tee_side.recorder import Recorder
from tee_side.request import Piece, Progress, RpcTotals
from tee_side.room import DEFAULT_CHUNK_TOKENS, Room, check_keys
from tee_side.rope import Ropes
from tee_side.sampler import Sampler, end_tokens, generation_config
from tee_side.tokenizer import Prompt, TextStream, Tokenizer
from tee_side.weights import Weights


class Pipeline:
    """Everything that one engine holds. Make it with `open`, end it with `close`."""

    def __init__(
        self, checkpoint: Checkpoint, options: EngineOptions, link: Link, lanes: Lanes, recorder: Recorder | None
    ) -> None:
        spec = checkpoint.spec
        self.spec = spec
        self._options = options
        self._layouts = link.layouts
        self._link = link
        self._lanes = lanes
        self._recorder = recorder
        config, self._defaults = _read_configs(checkpoint.directory)
        self._tokenizer = Tokenizer(checkpoint.directory, spec.vocab_size)
        self._end = end_tokens(self._defaults, config)
        weights = Weights(checkpoint, embedding=Op.EMBEDDING not in OPERATIONS[options.partition])
        self._model = Model(spec, config, weights, PARTITIONS[options.partition], recorder)
        self._memory = KVMemory(spec, options.kv_memory or _quarter_of_memory())
        self._chunk_tokens = options.chunk_tokens or DEFAULT_CHUNK_TOKENS
        self.load_s = 0.0

    @classmethod
    async def open(cls, checkpoint: Checkpoint, options: EngineOptions, endpoint: Endpoint) -> Pipeline:
        start = time.perf_counter()
        layouts = Layouts(checkpoint.spec, WIRE_DTYPES[options.dtype])
        room = Room.of(checkpoint.spec, layouts, options)
        recorder = Recorder.wanted_by(options)
        link = await Link.open(endpoint, checkpoint, options, layouts, room)
        try:
            pipeline = cls(checkpoint, options, link, Lanes(room.lanes, room.slots), recorder)
        except BaseException:
            link.close()
            raise
        pipeline.load_s = time.perf_counter() - start
        return pipeline

    def close(self) -> ClockOffset | None:
        """Also writes what was recorded; with a trace, tells how well it knows the GPU side's clock."""
        self._link.close()
        return None if self._recorder is None else self._recorder.close()

    async def generate(
        self, prompt: Prompt, sampling: SamplingOptions, progress: Progress
    ) -> AsyncGenerator[Piece, None]:
        """Raises PromptError before the first piece for a prompt that cannot be run."""
        started_at = time.perf_counter()
        tokens = self._tokenizer.encode(prompt)
        room = self.spec.max_positions - len(tokens)
        if room < 1:
            raise PromptError(f"the prompt has {len(tokens)} tokens, the model's context is {self.spec.max_positions}")
        most = min(sampling.max_new_tokens, room)
        progress.prompt_tokens = len(tokens)
        progress.timing.load_s = self.load_s
        sampler = Sampler(sampling, self._defaults, self._end)
        text = TextStream(self._tokenizer, tokens, sampling.stop)
        self._watch(sampler, text)
        async with self._room_for(len(tokens), most) as cache:
            sequence = self._model.sequence(cache)
            async for token in self._tokens(tokens, most, sequence, sampler, progress):
                ended = token in self._end
                certain = "" if ended else text.push(token)
                last = ended or text.stopped or progress.completion_tokens == most
                if not last:
                    yield Piece(certain, token)
                    continue
                reason = "stop" if ended or text.stopped else "length"
                progress.stats = None if self._recorder is None else self._recorder.stats(started_at)
                yield Piece(certain + text.finish(), token, reason)
                return

    async def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """The scores after each token: [tokens, vocab] float32."""
        ids = self._tokenizer.encode(tokens)
        if len(ids) > self.spec.max_positions:
            raise PromptError(f"{len(ids)} tokens, the model's context is {self.spec.max_positions}")
        async with self._room_for(len(ids), 0) as cache:
            return await self._forward(ids, self._model.sequence(cache), RpcTotals(), last_only=False)

    def _watch(self, sampler: Sampler, text: TextStream) -> None:
        if self._recorder is not None:
            for target in (sampler, text):
                self._recorder.watch(target, lane=0)

    def _room_for(self, prompt_tokens: int, new_tokens: int) -> AbstractAsyncContextManager[KVCache]:
        """Raises PromptError if they can never be run."""
        slot_bytes = self._link.session.carrier.slot_bytes
        check_keys(self._layouts, self._options.partition, slot_bytes, prompt_tokens + new_tokens)
        return self._memory.sequence(prompt_tokens, new_tokens)

    async def _tokens(
        self, prompt: list[int], most: int, sequence: RunningSequence, sampler: Sampler, progress: Progress
    ) -> AsyncGenerator[int, None]:
        timing, seen, new = progress.timing, list(prompt), prompt
        for index in range(most):
            start = time.perf_counter()
            scores = await self._forward(new, sequence, progress.rpc, last_only=True)
            if not scores.isfinite().all():
                raise ProtocolError("the scores are not finite: the GPU side is broken, or float16 overflowed")
            token = sampler.choose(scores[0], seen)
            spent = time.perf_counter() - start
            progress.completion_tokens += 1
            if index == 0:
                timing.prefill_s = spent
            else:
                timing.decode_s += spent
                timing.ms_per_token = 1e3 * timing.decode_s / index
            seen.append(token)
            new = [token]
            yield token

    async def _forward(
        self, tokens: list[int], sequence: RunningSequence, totals: RpcTotals, last_only: bool
    ) -> torch.Tensor:
        """Runs the next tokens of a sequence, chunk by chunk -> scores, of the last one or of all."""
        async with self._lanes.take() as lane:
            gpu = Offload(self._link, lane, totals, None if self._recorder is None else self._recorder.note)
            scores = []
            for chunk, last in _chunks(tokens, self._chunk_tokens):
                wanted = slice(None) if not last_only else slice(-1, None) if last else slice(0)
                scores.append(await self._model.forward(torch.tensor(chunk), sequence, gpu, lane.index, wanted))
            return scores[0] if len(scores) == 1 else torch.cat(scores)


def _read_configs(directory: Path) -> tuple[LlamaConfig, GenerationConfig]:
    """transformers' own view of a checkpoint, tried out. Raises CheckpointError for what it cannot work with."""
    try:
        config, defaults = LlamaConfig.from_pretrained(directory), generation_config(directory)
        Ropes(config).for_sequence().angles(0, 1)
        Sampler(SamplingOptions(), defaults, frozenset())
    except Exception as error:  # whatever transformers raises for each of its many fields
        raise CheckpointError(f"{directory}: its config or generation config is unusable: {one_line(error)}") from None
    return config, defaults


def _chunks(tokens: list[int], size: int) -> list[tuple[list[int], bool]]:
    """Pieces of the prompt, and whether each is the last."""
    return [(tokens[start : start + size], start + size >= len(tokens)) for start in range(0, len(tokens), size)]


def _quarter_of_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
