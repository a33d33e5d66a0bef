"""Calls and bytes, of a prefill and of a decode step."""

from __future__ import annotations

from benchmarks.contenders import Answer

COUNTS = ("calls", "bytes_sent", "bytes_received")


def of_a_prefill(answer: Answer) -> dict[str, float]:
    """answer: of one token."""
    return {key: answer["rpc"][key] for key in COUNTS}


def of_a_step(answer: Answer, first_token: Answer) -> dict[str, float]:
    """What a step takes is a long answer's total less its first token's."""
    steps = len(answer["token_ids"]) - 1
    return {key: (answer["rpc"][key] - first_token["rpc"][key]) / steps for key in COUNTS}
