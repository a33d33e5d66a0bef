"""The TEE side put together: from a prompt to pieces of text, any number of them at once."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from transformers import GenerationConfig

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.config import EngineOptions, SamplingOptions
from asynctsqp.errors import AsynctsqpError, CheckpointError, ContextLengthError, one_line
from asynctsqp.filling import Report, silent
from asynctsqp.layouts import OPERATIONS, Layouts
from asynctsqp.memory import host_bytes
from asynctsqp.model_spec import Op
from asynctsqp.reports.clock import ClockOffset
from asynctsqp.tensor_codec import wire_dtype
from tee_side.batches import Batches, Request
from tee_side.generation import Generation, Scoring
from tee_side.kv_cache import KVCache, KVMemory
from tee_side.lanes import Lane
from tee_side.link import Endpoint, Link
from tee_side.llama_config import LlamaConfig
from tee_side.meter import Meter
from tee_side.model import Model
from tee_side.partitions import PARTITIONS
from tee_side.recorder import Recorder
from tee_side.request import Piece, Progress
from tee_side.room import Room, check_keys, policy
from tee_side.rope import Ropes
from tee_side.rounded_attention import attention_in
from tee_side.sampler import Sampler, end_tokens, generation_config
from tee_side.scheduler import Scheduler
from tee_side.scores import Scorer, TokenScore
from tee_side.seals import Sealer
from tee_side.shield import sealer_for
from tee_side.tokenizer import Prompt, TextStream, Tokenizer
from tee_side.weights import Weights

Part = TypeVar("Part")


class Pipeline:
    """Everything that one engine holds. Make it with `open`, end it with `close`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: EngineOptions,
        link: Link,
        sealer: Sealer,
        recorder: Recorder | None,
    ) -> None:
        spec = checkpoint.spec
        self.spec = spec
        self.fingerprint = link.fingerprint
        self.meter = Meter()
        self._options = options
        self._link = link
        self._sealer = sealer
        self._recorder = recorder
        config, self._defaults = _read_configs(checkpoint.directory)
        self._tokenizer = Tokenizer(checkpoint.directory, spec.vocab_size)
        self._end = end_tokens(self._defaults, config)
        self._memory = KVMemory(spec, options.kv_memory or host_bytes() // 4)
        weights = Weights(checkpoint, embedding=Op.EMBEDDING not in OPERATIONS[options.partition])
        attend = attention_in(wire_dtype(options.dtype, sealer.weight_bits))
        self._model = Model(spec, config, weights, PARTITIONS[options.partition], attend, link.pace, recorder)
        session, room = link.session, link.session.room
        scheduler: Scheduler[Request] = Scheduler(policy(options, room, session.device, session.carrier.transport))
        lanes = [Lane(index, room.slots) for index in range(room.lanes)]
        note = None if recorder is None else recorder.note
        self._batches = Batches(scheduler, self._model, link, sealer, lanes, note, self.meter)
        self.load_s = 0.0

    @classmethod
    async def open(
        cls, checkpoint: Checkpoint, options: EngineOptions, endpoint: Endpoint, threads: int, report: Report = silent
    ) -> Pipeline:
        """threads: for masks; this thread has its own number. report: told how far the weights are read."""
        start = time.perf_counter()
        recorder = Recorder.wanted_by(options)
        async with contextlib.AsyncExitStack() as opened:
            early = asyncio.create_task(_found(endpoint))  # a local GPU side starts while we read the weights
            opened.callback(early.cancel)
            sealer = await sealer_for(checkpoint, options, threads, report)
            opened.push_async_callback(sealer.close)
            layouts = Layouts(checkpoint.spec, wire_dtype(options.dtype, sealer.weight_bits))
            rooms = partial(Room.of, checkpoint.spec, layouts, options)
            link = await Link.open(endpoint, checkpoint, options, layouts, rooms, sealer)
            opened.callback(link.close)
            pipeline = cls(checkpoint, options, link, sealer, recorder)
            opened.pop_all()
        pipeline.load_s = time.perf_counter() - start
        return pipeline

    async def close(self) -> ClockOffset | None:
        """Also writes what was recorded; with a trace, tells how well it knows the GPU side's clock."""
        self._batches.close()
        self._link.close()
        await self._sealer.close()
        return None if self._recorder is None else self._recorder.close()

    @property
    def waiting(self) -> int:
        """Requests for whose keys and values there is no room yet."""
        return self._memory.waiting

    @property
    def failure(self) -> AsynctsqpError | None:
        """What any request would fail with now, as far as it is known without asking; None: it would run."""
        return self._batches.failure or self._sealer.failure or self._link.session.connection.lost

    async def keep_connected(self) -> None:
        await self._link.keep()

    async def tokenize(self, prompt: Prompt) -> list[int]:
        """In a helper thread: a megabyte of text takes seconds, in which the others' calls go on."""
        return await asyncio.to_thread(self._tokenizer.encode, prompt)

    async def prepare_masks(self, tokens: int, report: Report) -> int:
        return await self._sealer.prepare(tokens, report)

    async def generate(
        self, prompt: Prompt, sampling: SamplingOptions, progress: Progress, logprobs: int | None
    ) -> AsyncGenerator[Piece, None]:
        """Raises BadInputError before the first piece for what cannot be run."""
        started_at = time.perf_counter()
        tokens = await self.tokenize(prompt)
        room = self.spec.max_positions - len(tokens)
        if room < 1:
            raise ContextLengthError(
                f"the prompt has {len(tokens)} tokens, the model's context is {self.spec.max_positions}"
            )
        most = min(sampling.max_new_tokens, room)
        progress.prompt_tokens = len(tokens)
        progress.timing.load_s = self.load_s
        sampler = Sampler(sampling, self._defaults, self._end)
        scorer = None if logprobs is None else Scorer(self._tokenizer.bytes_of, logprobs)
        text = TextStream(self._tokenizer, tokens, sampling.stop)
        self._watch(sampler, text)
        async with self._room_for(len(tokens), most) as cache:
            request = Generation(
                self._model.sequence(cache, len(tokens)), sampler, text, tokens, most, self._end, progress, scorer
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
        parts = await self._score(await self.tokenize(tokens), lambda first, rows: rows)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    async def score(self, prompt: Prompt, top: int) -> list[TokenScore]:
        """Of a chunk's scores only the log-probabilities stay. What follows the last token is nobody's question."""
        scorer = Scorer(self._tokenizer.bytes_of, top)
        tokens = await self.tokenize(prompt)

        def keep(first: int, rows: torch.Tensor) -> list[TokenScore]:
            return scorer.score(rows, tokens[first + 1 : first + 1 + len(rows)])

        parts = await self._score(tokens[:-1], keep) if len(tokens) > 1 else []
        return [scorer.first(tokens[0]), *itertools.chain.from_iterable(parts)]

    async def _score(self, tokens: Sequence[int], keep: Callable[[int, torch.Tensor], Part]) -> list[Part]:
        """What `keep` makes of each chunk's scores (generation.Scoring), in the order of the tokens."""
        if len(tokens) > self.spec.max_positions:
            raise ContextLengthError(f"{len(tokens)} tokens, the model's context is {self.spec.max_positions}")
        async with self._room_for(len(tokens), 0) as cache:
            request = Scoring(self._model.sequence(cache, len(tokens)), len(tokens), keep)
            self._batches.submit(request, tokens, every=True)
            try:
                return await request.parts
            finally:
                self._batches.leave(request)

    def _watch(self, sampler: Sampler, text: TextStream) -> None:
        if self._recorder is not None:
            for target in (sampler, text):
                self._recorder.watch(target, lane=0)

    @contextlib.asynccontextmanager
    async def _room_for(self, prompt_tokens: int, new_tokens: int) -> AsyncIterator[KVCache]:
        """Raises PromptError if they can never be run."""
        session = self._link.session
        check_keys(session.layouts, self._options.partition, session.carrier.slot_bytes, prompt_tokens + new_tokens)
        async with self._memory.sequence(prompt_tokens, new_tokens) as cache:
            with self._sealer.working(), self.meter.request():
                yield cache


async def _found(endpoint: Endpoint) -> None:
    """Where it is not, whoever connects says why."""
    with contextlib.suppress(AsynctsqpError):
        await endpoint()


def _read_configs(directory: Path) -> tuple[LlamaConfig, GenerationConfig]:
    """transformers' own view of a checkpoint, tried out. Raises CheckpointError for what it cannot work with."""
    try:
        config, defaults = LlamaConfig.from_pretrained(directory), generation_config(directory)
        Ropes(config).for_sequence(1).angles(0, 1)
        Sampler(SamplingOptions(), defaults, frozenset())
    except Exception as error:  # whatever transformers raises for each of its many fields
        raise CheckpointError(f"{directory}: its config or generation config is unusable: {one_line(error)}") from None
    return config, defaults
