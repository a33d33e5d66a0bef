"""How much of an answer's time either side computed; the rest is communication."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asynctsqp import Engine


def computed(engine: Engine, first_token_at: float) -> dict[str, float]:
    """Seconds of computing since the last call: before the first token, and after it; either side's, the GPU side's.

    The only place that knows where these come from: the records of an engine that was made with `stats=True`, which
    are taken out. Without any, all of it is zero.
    """
    pipeline = engine._pipeline
    recorder = None if pipeline is None else pipeline._recorder
    if recorder is None:
        return dict.fromkeys(("first_s", "rest_s", "gpu_first_s", "gpu_rest_s"), 0.0)
    records = recorder.records
    by_tee = [(span.start_at, span.end_at - span.start_at) for span in records.spans]
    by_gpu = [(rpc.start_at, rpc.gpu_s) for rpc in records.rpcs]
    records.spans.clear()
    records.rpcs.clear()
    first_s, rest_s = _around(first_token_at, by_tee + by_gpu)
    gpu_first_s, gpu_rest_s = _around(first_token_at, by_gpu)
    return {"first_s": first_s, "rest_s": rest_s, "gpu_first_s": gpu_first_s, "gpu_rest_s": gpu_rest_s}


def _around(moment: float, spent: list[tuple[float, float]]) -> tuple[float, float]:
    """spent: when something began, and the seconds that it took -> what began before the moment, and after it."""
    before = sum(seconds for start, seconds in spent if start < moment)
    return before, sum(seconds for start, seconds in spent if start >= moment)


def communication_share(answer: Mapping[str, Any], key: str) -> float:
    """1 - (TEE side's computing + GPU side's computing) / wall. key: "first_s", to the first token, or "rest_s".

    Encoding, copying, messages, wake-ups, waiting for a core, and what the event loop does: whatever is no operation
    of the model. Where both sides compute at once it comes out too small, and not below zero.
    """
    return max(0.0, 1 - float(answer["computed"][key]) / float(answer[key]))


def gpu_share(answer: Mapping[str, Any], key: str) -> float:
    """The GPU side's computing / wall; as much as 1 where calls of several lanes are computed at once."""
    return min(1.0, float(answer["computed"][f"gpu_{key}"]) / float(answer[key]))
