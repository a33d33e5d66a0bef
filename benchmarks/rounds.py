"""Several contenders by turns, A B C A B C, until enough rounds were taken while the machine was quiet."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from benchmarks.cli import Step
from benchmarks.contenders import Answer
from benchmarks.harness import QUIET
from benchmarks.turns import FEWEST, Limits

Name = TypeVar("Name")  # of a contender


def alternate(
    names: Sequence[Name], run: Callable[[Name], Answer], limits: Limits, step: Step
) -> list[dict[Name, Answer]]:
    """run: one contender's answer, with `others_share`. A round has one of each; there is at least one round."""
    rounds: list[dict[Name, Answer]] = []
    end = time.monotonic() + limits.seconds
    while not rounds or (sum(map(quiet, rounds)) < limits.rounds and time.monotonic() < end):
        step(f"round {len(rounds) + 1}")
        rounds.append({name: run(name) for name in names})
    return rounds


def quiet(taken: Mapping[Any, Answer]) -> bool:
    return max(float(answer["others_share"]) for answer in taken.values()) <= QUIET


def used(rounds: Sequence[dict[Name, Answer]]) -> Sequence[dict[Name, Answer]]:
    """Those that the figures come from: the quiet ones, or all where those are too few."""
    chosen = [taken for taken in rounds if quiet(taken)]
    return chosen if len(chosen) >= min(FEWEST, len(rounds)) else rounds


def verdict(reached: bool, chosen: Sequence[Mapping[Any, Answer]]) -> str:
    """What may be said of an aim: a round in which other processes ran shows neither."""
    if not all(map(quiet, chosen)):
        return "disturbed"
    return "reached" if reached else "missed"


def how_quiet(rounds: Sequence[Mapping[Any, Answer]]) -> dict[str, Any]:
    """What a result says about it."""
    return {"rounds": len(rounds), "quiet_rounds": sum(map(quiet, rounds))}


def percentile(samples: Sequence[float], percent: float) -> float:
    """The smallest sample that so many percent of them do not exceed (nearest rank)."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]
