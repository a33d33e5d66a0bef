"""How much of an answer's time either side computed; the rest is communication."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asynctsqp import Engine


def computed(engine: Engine, first_token_at: float) -> dict[str, float]:
    """Seconds of computing, either side's, since the last call: before the first token, and after it.

    The only place that knows where these come from: the records of an engine that was made with `stats=True`, which
    are taken out. Without any, all of it is zero.
    """
    pipeline = engine._pipeline
    recorder = None if pipeline is None else pipeline._recorder
    if recorder is None:
        return {"first_s": 0.0, "rest_s": 0.0}
    records = recorder.records
    spent = [(span.start_at, span.end_at - span.start_at) for span in records.spans]
    spent += [(rpc.start_at, rpc.gpu_s) for rpc in records.rpcs]
    records.spans.clear()
    records.rpcs.clear()
    return {
        "first_s": sum(seconds for start, seconds in spent if start < first_token_at),
        "rest_s": sum(seconds for start, seconds in spent if start >= first_token_at),
    }


def communication_share(answer: Mapping[str, Any], key: str) -> float:
    """1 - (TEE side's computing + GPU side's computing) / wall. key: "first_s", to the first token, or "rest_s".

    Encoding, copying, messages, wake-ups, waiting for a core, and what the event loop does: whatever is no operation
    of the model. Where both sides compute at once it comes out too small, and not below zero.
    """
    return max(0.0, 1 - float(answer["computed"][key]) / float(answer[key]))
