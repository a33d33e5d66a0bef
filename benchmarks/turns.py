"""Two contenders by turns, A B A B, until enough pairs of samples were taken while the machine was quiet."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.cli import Step
from benchmarks.contenders import Answer, Contender, Measure
from benchmarks.figures import compare
from benchmarks.harness import QUIET

FEWEST = 3  # pairs that a median may come from


@dataclass(frozen=True)
class Limits:
    """When enough has been measured."""

    rounds: int  # of quiet pairs
    seconds: float  # after which it ends with what there is


@dataclass(frozen=True)
class Pair:
    """One sample of each contender, one right after the other."""

    ours: Answer
    theirs: Answer

    @property
    def others_share(self) -> float:
        return max(float(self.ours["others_share"]), float(self.theirs["others_share"]))

    @property
    def quiet(self) -> bool:
        return self.others_share <= QUIET


Pairs = Mapping[str, list[Pair]]  # by measure, in the order in which they were taken


def take_turns(ours: Contender, theirs: Contender, measures: Sequence[Measure], limits: Limits, step: Step) -> Pairs:
    """Each measure in each round, until its quiet pairs are enough or time is up."""
    pairs: dict[str, list[Pair]] = {measure.name: [] for measure in measures}
    end = time.monotonic() + limits.seconds

    def missing(measure: Measure) -> bool:
        taken = pairs[measure.name]
        late = bool(taken) and time.monotonic() > end
        return not late and sum(pair.quiet for pair in taken) < limits.rounds

    number = 0
    while wanted := [measure for measure in measures if missing(measure)]:
        number += 1
        step(f"round {number}")
        for measure in wanted:
            pairs[measure.name].append(Pair(ours.run(measure), theirs.run(measure)))
    return pairs


def used(pairs: Sequence[Pair]) -> Sequence[Pair]:
    """Those that the figures come from: the quiet ones, or all where those are too few."""
    quiet = [pair for pair in pairs if pair.quiet]
    return quiet if len(quiet) >= min(FEWEST, len(pairs)) else pairs


def times(measure: Measure, pairs: Sequence[Pair]) -> dict[str, Any]:
    """The figures of one measure, and every sample that they come from."""
    counted = used(pairs)
    ours, theirs = [measure.value(pair.ours) for pair in counted], [measure.value(pair.theirs) for pair in counted]
    samples = [
        {
            "ours": measure.value(pair.ours),
            "theirs": measure.value(pair.theirs),
            "others_share": pair.others_share,
            "quiet": pair.quiet,
            "used": pair in counted,
        }
        for pair in pairs
    ]
    figures = dataclasses.asdict(compare(ours, theirs))
    disturbed = not all(pair.quiet for pair in counted)
    return {"unit": measure.unit, **figures, "disturbed": disturbed, "samples": samples}
