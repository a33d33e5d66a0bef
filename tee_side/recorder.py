"""Notes what happens, for --stats, --log-rpc and --trace. Without them there is none, and nothing is wrapped."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from asynctsqp.config import EngineOptions
from asynctsqp.records import Records, RpcRecord, Span

MOST = 2_000_000  # calls and operations that are kept: some hundred MiB

# leaf operations only: spans do not overlap
_NAMES = {
    "embed": "EMBEDDING",
    "attention_norm": "RMSNORM",
    "mlp_norm": "RMSNORM",
    "final_norm": "RMSNORM",
    "rotate": "ROTARY",
    "attention": "ATTENTION",
    "softmax": "SOFTMAX",
    "rows": "TRANSPOSE",
    "silu_mul": "SILU",
    "add": "RESIDUAL",
    "choose": "SAMPLER",
    "push": "TEXT",
}


class Recorder:
    """One engine's. `close` writes what is to be written."""

    def __init__(self, options: EngineOptions) -> None:
        """Raises BadInputError for a file that cannot be written."""
        self.records = Records()
        self._keep = options.stats or options.trace is not None

    @classmethod
    def wanted_by(cls, options: EngineOptions) -> Recorder | None:
        return cls(options) if options.stats or options.trace or options.log_rpc else None

    def note(self, record: RpcRecord) -> None:
        """A call has come back."""
        if self._keep and len(self.records.rpcs) < MOST:
            self.records.rpcs.append(record)

    def watch(self, target: Any, lane: int) -> None:
        """Times the operations of an object, from here on, wherever it is called by name."""
        if not self._keep:
            return
        for method, name in _NAMES.items():
            if hasattr(target, method):
                setattr(target, method, self._timed(getattr(target, method), name, lane))

    def close(self) -> None:
        pass

    def _timed(self, operation: Callable[..., Any], name: str, lane: int) -> Callable[..., Any]:
        spans = self.records.spans

        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = operation(*arguments)
            if len(spans) < MOST:
                spans.append(Span(name, lane, start, time.perf_counter()))
            return result

        return timed
