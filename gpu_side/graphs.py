"""Which calls come again and again, and what was recorded of them, so that each is one launch from then on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

MOST_CALLS = 4096  # of all lanes; 32 layers in `shielded` on two lanes of two slots are 516

log = logging.getLogger(__name__)


class Work(Protocol):
    """What a call puts on a stream."""

    start: torch.cuda.Event  # recorded just before the program, each time that the work is queued
    end: torch.cuda.Event  # and just after it

    def queue(self) -> None:
        """Puts all of it on the current stream."""


class Recording(Work, Protocol):
    """Work that was recorded: `queue` is one launch."""

    def destroy(self) -> None:
        """Gives its memory back. To be called while no stream is at work on it."""


@dataclass
class _Lane:
    works: dict[object, Work] = field(default_factory=dict)
    recordings: dict[object, Recording] = field(default_factory=dict)


class Graphs:
    """The repeated calls of all lanes. A call runs as it is the first time, is recorded at its second, and replayed.

    The first time settles what cannot be recorded: libraries choose their kernels and load them, and get their
    workspaces on the lane's stream. Once a recording has failed no other is begun: most likely memory is short, and
    torch's allocator may not know that the recording is over.
    """

    def __init__(self, record: Callable[[object, Work], Recording], most: int = MOST_CALLS) -> None:
        """record(lane, work) raises RuntimeError where it cannot; most: calls that are kept, those not yet recorded
        included. Nothing makes way for another: it would only be back at the next token."""
        self._record = record
        self._most = most
        self._kept = 0
        self._failed = False
        self._lanes: dict[object, _Lane] = {}

    def queue(self, lane: object, call: object, make: Callable[[], Work]) -> Work:
        """Puts a call on the current stream. -> what was put there.

        call: names the same program on the same tensors each time, until `forget`; None: it will not come again.
        """
        kept = self._lanes.setdefault(lane, _Lane())
        work = self._found(lane, call, kept) or make()
        work.queue()
        if call is not None and call not in kept.works and self._kept < self._most:  # it has run once now
            self._kept += 1
            kept.works[call] = work
        return work

    def forget(self, lane: object) -> None:
        """To be called while no stream is at work for the lane."""
        kept = self._lanes.pop(lane, _Lane())
        self._kept -= len(kept.works)
        for recording in kept.recordings.values():
            recording.destroy()

    def _found(self, lane: object, call: object, kept: _Lane) -> Work | None:
        """What is kept of a call, recorded if it can be."""
        if call in kept.recordings or call not in kept.works or self._failed:
            return kept.recordings.get(call) or kept.works.get(call)
        try:
            kept.recordings[call] = self._record(lane, kept.works[call])
        except RuntimeError as error:
            log.warning("calls are not recorded any more: %s", error)
            self._failed = True
            return kept.works[call]
        return kept.recordings[call]
