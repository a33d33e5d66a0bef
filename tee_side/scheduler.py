"""Which tokens go through the layers together, and when: pure bookkeeping, no I/O, no clock.

Requests come in with their prompts, and later with each token that was sampled for them. Whenever a lane is free it
asks for a micro-batch: the next token of every request that waits for one, and a chunk's worth of prompts: several
short ones, or a piece of a long one. So a request that decodes never waits for more than one chunk of other people's
prompts, and prompts take turns chunk by chunk.

    PROMPT --its chunks go out, several may be in flight--> SENT --the scores--> READY --its token goes out--> SENT

Batches are handed out in one global order, in which a request's portions are in the order of their tokens: who waits
for another batch (kv_cache.py) waits for an earlier one, so that no two can wait for each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

Name = TypeVar("Name")  # hashable: whatever the caller knows its requests by


class Wanted(Enum):
    """After which of a portion's tokens the scores are wanted."""

    NONE = slice(0)
    LAST = slice(-1, None)
    ALL = slice(None)


@dataclass(frozen=True)
class Portion(Generic[Name]):
    """Consecutive tokens of one request in a micro-batch."""

    request: Name
    first: int  # place of the first token in the prompt, for a chunk of one
    tokens: Sequence[int]
    wanted: Wanted
    decode: bool  # the next token of a request that has had its prompt


@dataclass(frozen=True)
class Policy:
    """How large micro-batches are."""

    chunk_tokens: int  # of prompts in one batch
    most_portions: int  # requests in one batch
    decode_lanes: int  # batches with decodes in flight at once


@dataclass
class _Prompt:
    """What is left of one."""

    tokens: Sequence[int]
    every: bool  # all scores are wanted
    sent: int = 0

    @property
    def left(self) -> int:
        return len(self.tokens) - self.sent


class Scheduler(Generic[Name]):
    """All running requests of one engine."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._running: set[Name] = set()
        self._prompts: deque[tuple[Name, _Prompt]] = deque()  # whose turn it is comes first
        self._ready: deque[tuple[Name, int]] = deque()  # sampled tokens that are to go out
        self._flying: list[int] = []  # decodes in each batch in flight that has any
        self._chunk_was_last = False  # the last batch had a chunk

    @property
    def running(self) -> frozenset[Name]:
        """All that were added and have not been removed."""
        return frozenset(self._running)

    def has(self, request: Name) -> bool:
        """Whether it was added and has not been removed."""
        return request in self._running

    def add(self, request: Name, prompt: Sequence[int], every: bool = False) -> None:
        """A new request, with at least one token. every: scores are wanted after each token, and no more tokens."""
        self._running.add(request)
        self._prompts.append((request, _Prompt(prompt, every)))

    def token(self, request: Name, token: int) -> None:
        """What was sampled for a request after its last scores; ignored if it has ended."""
        if request in self._running:
            self._ready.append((request, token))

    def remove(self, request: Name) -> None:
        """It has ended, or nobody waits for it any more. May be called again."""
        self._running.discard(request)
        self._prompts = deque(entry for entry in self._prompts if entry[0] != request)
        self._ready = deque(entry for entry in self._ready if entry[0] != request)

    def next(self) -> list[Portion[Name]]:
        """The next micro-batch; empty if there is nothing to do before something in flight has come back."""
        batch = self._decodes()
        if batch:
            self._flying.append(len(batch))
        batch += self._chunks(self._policy.most_portions - len(batch))
        self._chunk_was_last = bool(batch) and not batch[-1].decode
        return batch

    def done(self, batch: Sequence[Portion[Name]]) -> None:
        """A micro-batch has come back, or failed."""
        if decodes := sum(portion.decode for portion in batch):
            self._flying.remove(decodes)

    def _decodes(self) -> list[Portion[Name]]:
        if len(self._flying) == self._policy.decode_lanes:
            return []
        # all that decode, shared out evenly over the batches that may be in flight, so that each side works on one of
        # them: those that have come back together do not go out together if the others are fewer
        share = -(-(len(self._ready) + sum(self._flying)) // self._policy.decode_lanes)
        most = self._policy.most_portions
        if self._prompts and (most > 1 or not self._chunk_was_last):
            most -= 1  # room for a chunk; where a batch is one portion, every other one
        chosen = [self._ready.popleft() for _ in range(min(len(self._ready), share, most))]
        return [Portion(request, 0, [token], Wanted.LAST, decode=True) for request, token in chosen]

    def _chunks(self, most: int) -> list[Portion[Name]]:
        """A piece of the prompt whose turn it is, and whole ones after it while there is room."""
        chunks: list[Portion[Name]] = []
        room = self._policy.chunk_tokens
        while self._prompts and len(chunks) < most and (not chunks or self._prompts[0][1].left <= room):
            chunks.append(self._chunk(room))
            room -= len(chunks[-1].tokens)
        return chunks

    def _chunk(self, most: int) -> Portion[Name]:
        """At most so many tokens of the prompt whose turn it is."""
        request, prompt = self._prompts.popleft()
        first = prompt.sent
        tokens = prompt.tokens[first : first + most]
        prompt.sent += len(tokens)
        last = prompt.sent == len(prompt.tokens)
        if not last:
            self._prompts.append((request, prompt))
        wanted = Wanted.ALL if prompt.every else Wanted.LAST if last else Wanted.NONE
        return Portion(request, first, tokens, wanted, decode=False)
