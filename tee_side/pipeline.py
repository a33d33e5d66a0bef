"""The TEE side put together: from a prompt to pieces of text, any number of them at once."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.config import EngineOptions, SamplingOptions
from asynctsqp.errors import CheckpointError, PromptError, one_line
from asynctsqp.layouts import OPERATIONS, Layouts
from asynctsqp.model_spec import Op
from asynctsqp.reports.clock import ClockOffset
from asynctsqp.tensor_codec import WIRE_DTYPES
from tee_side.batches import Batches, Request
from tee_side.generation import Generation, Scoring
from tee_side.kv_cache import KVCache, KVMemory
from tee_side.lanes import Lane
from tee_side.link import Endpoint, Link
from tee_side.model import Model
from tee_side.partitions import PARTITIONS
from tee_side.recorder import Recorder
from tee_side.request import Piece, Progress
from tee_side.room import Room, check_keys, policy
from tee_side.rope import Ropes
from tee_side.sampler import Sampler, end_tokens, generation_config
from tee_side.scheduler import Scheduler
from tee_side.tokenizer import Prompt, TextStream, Tokenizer
from tee_side.weights import Weights


class Pipeline:
    """Everything that one engine holds. Make it with `open`, end it with `close`."""

    def __init__(
        self, checkpoint: Checkpoint, options: EngineOptions, link: Link, room: Room, recorder: Recorder | None
    ) -> None:
        spec = checkpoint.spec
        self.spec = spec
        self._options = options
        self._link = link
        self._recorder = recorder
        config, self._defaults = _read_configs(checkpoint.directory)
        self._tokenizer = Tokenizer(checkpoint.directory, spec.vocab_size)
        self._end = end_tokens(self._defaults, config)
        self._memory = KVMemory(spec, options.kv_memory or _quarter_of_memory())
        weights = Weights(checkpoint, embedding=Op.EMBEDDING not in OPERATIONS[options.partition])
        self._model = Model(spec, config, weights, PARTITIONS[options.partition], recorder)
        scheduler: Scheduler[Request] = Scheduler(policy(options, room, link.session.device))
        lanes = [Lane(index, room.slots) for index in range(room.lanes)]
        self._batches = Batches(scheduler, self._model, link, lanes, None if recorder is None else recorder.note)
        self.load_s = 0.0

    @classmethod
    async def open(cls, checkpoint: Checkpoint, options: EngineOptions, endpoint: Endpoint) -> Pipeline:
        start = time.perf_counter()
        layouts = Layouts(checkpoint.spec, WIRE_DTYPES[options.dtype])
        room = Room.of(checkpoint.spec, layouts, options)
        recorder = Recorder.wanted_by(options)
        link = await Link.open(endpoint, checkpoint, options, layouts, room)
        try:
            pipeline = cls(checkpoint, options, link, room, recorder)
        except BaseException:
            link.close()
            raise
        pipeline.load_s = time.perf_counter() - start
        return pipeline

    def close(self) -> ClockOffset | None:
        """Also writes what was recorded; with a trace, tells how well it knows the GPU side's clock."""
        self._batches.close()
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
            request = Generation(
                self._model.sequence(cache, len(tokens)), sampler, text, tokens, most, self._end, progress
            )
            self._batches.submit(request, tokens, every=False)
            try:
                async with contextlib.aclosing(request.pieces()) as pieces:
                    async for piece in pieces:
                        if piece.finish_reason is not None and self._recorder is not None:
                            progress.stats = self._recorder.stats(started_at)
                        yield piece
            finally:
                self._batches.leave(request)

    async def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """The scores after each token: [tokens, vocab] float32."""
        ids = self._tokenizer.encode(tokens)
        if len(ids) > self.spec.max_positions:
            raise PromptError(f"{len(ids)} tokens, the model's context is {self.spec.max_positions}")
        async with self._room_for(len(ids), 0) as cache:
            request = Scoring(self._model.sequence(cache, len(ids)), len(ids))
            self._batches.submit(request, ids, every=True)
            try:
                return await request.scores
            finally:
                self._batches.leave(request)

    def _watch(self, sampler: Sampler, text: TextStream) -> None:
        if self._recorder is not None:
            for target in (sampler, text):
                self._recorder.watch(target, lane=0)

    def _room_for(self, prompt_tokens: int, new_tokens: int) -> AbstractAsyncContextManager[KVCache]:
        """Raises PromptError if they can never be run."""
        session = self._link.session
        check_keys(session.layouts, self._options.partition, session.carrier.slot_bytes, prompt_tokens + new_tokens)
        return self._memory.sequence(prompt_tokens, new_tokens)


def _read_configs(directory: Path) -> tuple[LlamaConfig, GenerationConfig]:
    """transformers' own view of a checkpoint, tried out. Raises CheckpointError for what it cannot work with."""
    try:
        config, defaults = LlamaConfig.from_pretrained(directory), generation_config(directory)
        Ropes(config).for_sequence(1).angles(0, 1)
        Sampler(SamplingOptions(), defaults, frozenset())
    except Exception as error:  # whatever transformers raises for each of its many fields
        raise CheckpointError(f"{directory}: its config or generation config is unusable: {one_line(error)}") from None
    return config, defaults


def _quarter_of_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
