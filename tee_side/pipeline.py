"""The TEE side put together: from a prompt to pieces of text, any number of them at once."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.config import EngineOptions, SamplingOptions
from asynctsqp.errors import BadInputError, CheckpointError, PromptError, ProtocolError, one_line
from asynctsqp.limits import SLOT_ALIGNMENT
from asynctsqp.model_spec import ModelSpec
from asynctsqp.tensor_codec import WIRE_DTYPES
from tee_side.kv_cache import KVMemory
from tee_side.lanes import Lanes
from tee_side.link import Endpoint, Link
from tee_side.model import Model
from tee_side.model import Sequence as RunningSequence
from tee_side.offload import Offload
from tee_side.partitions import shielded
from tee_side.request import Piece, Progress, RpcTotals
from tee_side.rope import Rope
from tee_side.sampler import Sampler, end_tokens, generation_config
from tee_side.tokenizer import Prompt, TextStream, Tokenizer
from tee_side.weights import Weights

DEFAULT_LANES = 2
DEFAULT_CHUNK_TOKENS = 1024
DEFAULT_SLOT_BYTES = 16 << 20


class Pipeline:
    """Everything that one engine holds. Make it with `open`, end it with `close`."""

    def __init__(self, checkpoint: Checkpoint, options: EngineOptions, link: Link, lanes: Lanes) -> None:
        spec = checkpoint.spec
        self.spec = spec
        self._link = link
        self._lanes = lanes
        self._config, self._defaults = _read_configs(checkpoint.directory)
        self._tokenizer = Tokenizer(checkpoint.directory, spec.vocab_size)
        self._end = end_tokens(self._defaults, self._config)
        self._model = Model(spec, Weights(checkpoint), shielded)
        self._memory = KVMemory(spec, options.kv_memory or _quarter_of_memory())
        self._chunk_tokens = options.chunk_tokens or DEFAULT_CHUNK_TOKENS
        self.load_s = 0.0

    @classmethod
    async def open(cls, checkpoint: Checkpoint, options: EngineOptions, endpoint: Endpoint) -> Pipeline:
        start = time.perf_counter()
        lanes = options.lanes or DEFAULT_LANES
        link = await Link.open(endpoint, checkpoint, options, lanes, slot_bytes(checkpoint.spec, options))
        try:
            pipeline = cls(checkpoint, options, link, Lanes(lanes))
        except BaseException:
            link.close()
            raise
        pipeline.load_s = time.perf_counter() - start
        return pipeline

    def close(self) -> None:
        self._link.close()

    async def generate(
        self, prompt: Prompt, sampling: SamplingOptions, progress: Progress
    ) -> AsyncGenerator[Piece, None]:
        """Raises PromptError before the first piece for a prompt that cannot be run."""
        tokens = self._tokenizer.encode(prompt)
        room = self.spec.max_positions - len(tokens)
        if room < 1:
            raise PromptError(f"the prompt has {len(tokens)} tokens, the model's context is {self.spec.max_positions}")
        most = min(sampling.max_new_tokens, room)
        progress.prompt_tokens = len(tokens)
        progress.timing.load_s = self.load_s
        sampler = Sampler(sampling, self._defaults, self._end)
        text = TextStream(self._tokenizer, tokens, sampling.stop)
        async with self._memory.sequence(len(tokens), most) as cache:
            sequence = RunningSequence(cache, self._config)
            async for token in self._tokens(tokens, most, sequence, sampler, progress):
                ended = token in self._end
                certain = "" if ended else text.push(token)
                last = ended or text.stopped or progress.completion_tokens == most
                if not last:
                    yield Piece(certain, token)
                    continue
                reason = "stop" if ended or text.stopped else "length"
                yield Piece(certain + text.finish(), token, reason)
                return

    async def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """The scores after each token: [tokens, vocab] float32."""
        ids = self._tokenizer.encode(tokens)
        if len(ids) > self.spec.max_positions:
            raise PromptError(f"{len(ids)} tokens, the model's context is {self.spec.max_positions}")
        async with self._memory.sequence(len(ids), 0) as cache:
            return await self._forward(ids, RunningSequence(cache, self._config), RpcTotals(), last_only=False)

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
            gpu = Offload(self._link, lane, self.spec, totals)
            hidden = [
                await self._model.forward(torch.tensor(chunk), sequence, gpu)
                for chunk in _chunks(tokens, self._chunk_tokens)
            ]
            wanted = hidden[-1][-1:] if last_only else torch.cat(hidden)
            return await self._model.logits(wanted, gpu)


def _read_configs(directory: Path) -> tuple[LlamaConfig, GenerationConfig]:
    """transformers' own view of a checkpoint, tried out. Raises CheckpointError for what it cannot work with."""
    try:
        config, defaults = LlamaConfig.from_pretrained(directory), generation_config(directory)
        Rope(config)
        Sampler(SamplingOptions(), defaults, frozenset())
    except Exception as error:  # whatever transformers raises for each of its many fields
        raise CheckpointError(f"{directory}: its config or generation config is unusable: {one_line(error)}") from None
    return config, defaults


def slot_bytes(spec: ModelSpec, options: EngineOptions) -> int:
    """What --slot-bytes says, or enough for a chunk's widest call up to 16 MiB, but always one row."""
    row = spec.widest * WIRE_DTYPES[options.dtype].itemsize
    if options.slot_bytes is not None:
        if options.slot_bytes < row:
            raise BadInputError(f"--slot-bytes is at least {row} for this model: one row of its widest product")
        return options.slot_bytes
    rows = min(options.chunk_tokens or DEFAULT_CHUNK_TOKENS, spec.max_positions)
    layer_row = spec.widest_in_layer * WIRE_DTYPES[options.dtype].itemsize
    return _round_up(max(row, min(DEFAULT_SLOT_BYTES, rows * layer_row)))


def _round_up(size: int) -> int:
    return -(-size // SLOT_ALIGNMENT) * SLOT_ALIGNMENT


def _chunks(tokens: list[int], size: int) -> list[list[int]]:
    return [tokens[start : start + size] for start in range(0, len(tokens), size)]


def _quarter_of_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
