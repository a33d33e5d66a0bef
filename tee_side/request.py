"""What a request reports: its pieces while it runs, its counts and times, and the whole answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from asynctsqp.reports.stats import Stats
from tee_side.scores import TokenScore


@dataclass(frozen=True)
class Piece:
    """One sampled token and the text that it made certain (empty while a character is incomplete)."""

    text: str
    token_id: int
    finish_reason: str | None = None  # "stop" or "length", on the last piece
    logprobs: TokenScore | None = None  # of the token, if it was asked for


@dataclass
class Timing:
    """Seconds of one request."""

    load_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    ms_per_token: float = 0.0


@dataclass
class RpcTotals:
    """What one request cost in communication. Bytes are of tensors."""

    calls: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    wait_s: float = 0.0

    def add(self, totals: RpcTotals, share: float) -> None:
        """A pass that several requests shared: its calls and waits count for each, its bytes by their rows."""
        self.calls += totals.calls
        self.bytes_sent += round(totals.bytes_sent * share)
        self.bytes_received += round(totals.bytes_received * share)
        self.wait_s += totals.wait_s


@dataclass
class Progress:
    """What is known about a request while it runs, and after."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    timing: Timing = field(default_factory=Timing)
    rpc: RpcTotals = field(default_factory=RpcTotals)
    stats: Stats | None = None  # where the time went, after the last piece, with the engine option `stats`

    def token_came(self, seconds: float) -> None:
        """One more, so long after the one before it, or after the request's beginning."""
        timing = self.timing
        self.completion_tokens += 1
        if self.completion_tokens == 1:
            timing.prefill_s = seconds
        else:
            timing.decode_s += seconds
            timing.ms_per_token = 1e3 * timing.decode_s / (self.completion_tokens - 1)


@dataclass(frozen=True)
class Completion:
    """A whole answer. `text` excludes the prompt; times in seconds; bytes are of tensors, both ways apart."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str  # "stop" or "length"
    timing: Timing
    rpc: RpcTotals
    stats: Stats | None
    logprobs: list[TokenScore] | None  # of each token, if they were asked for

    @classmethod
    def of(cls, pieces: Sequence[Piece], progress: Progress) -> Completion:
        """What the pieces of a finished stream add up to."""
        return cls(
            text="".join(piece.text for piece in pieces),
            token_ids=[piece.token_id for piece in pieces],
            prompt_tokens=progress.prompt_tokens,
            completion_tokens=progress.completion_tokens,
            finish_reason=pieces[-1].finish_reason or "stop",
            timing=progress.timing,
            rpc=progress.rpc,
            stats=progress.stats,
            logprobs=[piece.logprobs for piece in pieces if piece.logprobs is not None] or None,
        )
