"""Keys and values of running sequences, in blocks within one limit.

A sequence reserves the memory of its longest possible form before it starts (so two half-grown sequences can
never wait for each other), but blocks are allocated only as it grows. A block is never moved or copied:
attention runs over each block in place and merges the parts (attention.py). Blocks double in size up to
MAX_BLOCK_TOKENS, so that a long sequence has few of them; a prompt always lies in one.

    block 0: prompt, first of the answer   block 1       block 2
    [k k k k k k k k k k k k k k ]         [k k k k ]    [k k . . . . . . ]      . = room for the next tokens
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass

import numpy as np

from asynctsqp.errors import PromptError
from asynctsqp.model_spec import ModelSpec
from tee_side.arrays import Rows
from tee_side.attention import Run

BLOCK_TOKENS = 64
MAX_BLOCK_TOKENS = 1024
ANSWER_TOKENS = 256  # of the answer, that lie beside the prompt: a short answer never has a second block


class KVMemory:
    """The limit that all sequences share; who finds no room waits, first come first served."""

    def __init__(self, spec: ModelSpec, limit_bytes: int) -> None:
        self._spec = spec
        self._token_bytes = spec.layers * 2 * spec.kv_heads * spec.head_dim * np.float32().itemsize
        self._limit_bytes = limit_bytes
        self._reserved_bytes = 0
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def reserved_bytes(self) -> int:
        return self._reserved_bytes

    @property
    def waiting(self) -> int:
        """Sequences that there is no room for yet."""
        return len(self._queue)

    @contextlib.asynccontextmanager
    async def sequence(self, prompt_tokens: int, new_tokens: int) -> AsyncIterator[KVCache]:
        """Room for a prompt and at most `new_tokens` more. Raises PromptError if it could never fit."""
        tokens = prompt_tokens + new_tokens
        size = _round_up(tokens) * self._token_bytes
        if size > self._limit_bytes:
            raise PromptError(
                f"{tokens} tokens need {size >> 20} MiB of keys and values, --kv-memory is "
                f"{self._limit_bytes >> 20} MiB: raise it, or lower --max-new-tokens"
            )
        await self._reserve(size)
        try:
            yield KVCache(self._spec, prompt_tokens, tokens)
        finally:
            self._reserved_bytes -= size
            self._admit()

    async def _reserve(self, size: int) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._queue.append((size, turn))
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():  # never admitted
                self._queue = deque(entry for entry in self._queue if entry[1] is not turn)
            else:
                self._reserved_bytes -= size
            self._admit()
            raise

    def _admit(self) -> None:
        while self._queue and self._reserved_bytes + self._queue[0][0] <= self._limit_bytes:
            size, turn = self._queue.popleft()
            if not turn.cancelled():  # whoever waited has left, and has had no time to say so
                self._reserved_bytes += size
                turn.set_result(None)


class _Block:
    """keys, values: [layers, kv_heads, tokens, head_dim] float32, of which the first `used` tokens are taken."""

    def __init__(self, spec: ModelSpec, tokens: int) -> None:
        shape = (spec.layers, spec.kv_heads, tokens, spec.head_dim)
        self.keys: Rows = np.empty(shape, np.float32)
        self.values: Rows = np.empty(shape, np.float32)
        self.tokens = tokens
        self.used = 0


@dataclass(frozen=True)
class Span:
    """Where some consecutive tokens of one sequence lie: all in one block."""

    block: int
    start: int  # in the block
    length: int
    position: int  # of the first one, in the sequence


class KVCache:
    """One sequence's keys and values: at most `tokens` tokens, of which the prompt's come first."""

    def __init__(self, spec: ModelSpec, prompt_tokens: int, tokens: int) -> None:
        self._spec = spec
        self._first = min(prompt_tokens + ANSWER_TOKENS, tokens)
        self._room = _round_up(tokens)
        self._blocks: list[_Block] = []
        self._stored = [0] * spec.layers  # tokens whose keys and values a layer has
        self._turns: dict[tuple[int, int], asyncio.Future[None]] = {}  # by layer and first token
        self.failure: Exception | None = None  # what a pass over some of the tokens ended with
        self.length = 0

    def extend(self, length: int) -> Span:
        """Takes the next `length` positions, for all layers."""
        if not self._blocks or self._blocks[-1].tokens - self._blocks[-1].used < length:
            self._blocks.append(self._new_block(length))
        block = self._blocks[-1]
        span = Span(len(self._blocks) - 1, block.used, length, self.length)
        block.used += length
        self.length += length
        return span

    def _new_block(self, length: int) -> _Block:
        allocated = sum(block.tokens for block in self._blocks)
        wanted = _round_up(max(length, min(allocated, MAX_BLOCK_TOKENS) or self._first))
        return _Block(self._spec, max(length, min(wanted, self._room - allocated)))

    async def turn(self, layer: int, span: Span) -> bool:
        """Waits until a layer has the keys and values of all tokens before the span, which other lanes compute.

        False: it never will, because the pass over them has failed; `failure` says with what.
        """
        if self._stored[layer] < span.position and self.failure is None:
            turn = self._turns[layer, span.position] = asyncio.get_running_loop().create_future()
            await turn
        return self.failure is None

    def fail(self, failure: Exception) -> None:
        """A pass over some of the tokens has failed: those that wait for it wait no longer."""
        self.failure = failure
        for turn in self._turns.values():
            if not turn.done():
                turn.set_result(None)

    def store(self, layer: int, span: Span, k: Rows, v: Rows) -> None:
        """k, v: [kv_heads, n, head_dim] of the span's tokens."""
        block, end = self._blocks[span.block], span.start + span.length
        block.keys[layer, :, span.start : end] = k
        block.values[layer, :, span.start : end] = v
        self._stored[layer] = span.position + span.length
        if self._turns:
            turn = self._turns.pop((layer, self._stored[layer]), None)
            if turn is not None and not turn.done():
                turn.set_result(None)

    def runs(self, span: Span) -> list[Run]:
        """Keys and values of all tokens up to the span's last, block by block: views of all layers,
        [layers, kv_heads, tokens, head_dim] each.
        """
        past = self._blocks[: span.block]
        own, end = self._blocks[span.block], span.start + span.length
        return [
            *((block.keys[:, :, : block.used], block.values[:, :, : block.used]) for block in past),
            (own.keys[:, :, :end], own.values[:, :, :end]),
        ]


def _round_up(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS
