"""Notes what happens, for --stats, --log-rpc and --trace. Without them there is none, and nothing is wrapped."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from asynctsqp.config import EngineOptions
from asynctsqp.reports.clock import ClockOffset
from asynctsqp.reports.output_file import open_output
from asynctsqp.reports.records import Records, RpcRecord, Span
from asynctsqp.reports.rpc_log import RpcLog
from asynctsqp.reports.stats import Stats, stats_of
from asynctsqp.reports.trace import write_trace

# What is timed, by the name of the method. Leaf operations only: spans must not overlap.
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
    """One engine's."""

    def __init__(self, options: EngineOptions) -> None:
        """Opens the files, so that a wrong name is known at once. Raises BadInputError for one."""
        self._stats = options.stats
        self._trace = None if options.trace is None else Path(options.trace)
        if self._trace is not None:
            open_output(self._trace, "the trace").close()
        self._log = None if options.log_rpc is None else RpcLog(Path(options.log_rpc))
        self.records = Records()

    @classmethod
    def wanted_by(cls, options: EngineOptions) -> Recorder | None:
        return cls(options) if options.stats or options.trace or options.log_rpc else None

    def note(self, record: RpcRecord) -> None:
        """A call has come back."""
        if self._log is not None:
            self._log.write(record)
        if self._keeps:
            self.records.rpcs.append(record)

    def watch(self, target: Any, lane: int) -> None:
        """Times the operations of an object, from here on, wherever they are called by name."""
        if self._keeps:
            for method, name in _NAMES.items():
                if hasattr(target, method):
                    setattr(target, method, self._timed(getattr(target, method), name, lane))

    def unwatch(self, target: Any) -> None:
        """Lets go of it: it and its timed operations hold each other, and what else it holds is large."""
        for method in _NAMES:
            vars(target).pop(method, None)

    def stats(self, start_at: float) -> Stats | None:
        """Of the time from then until now, if they are wanted."""
        return stats_of(self.records, start_at, time.perf_counter()) if self._stats else None

    def close(self) -> ClockOffset | None:
        """Writes what is to be written; tells how well a trace knows the GPU side's clock."""
        if self._log is not None:
            self._log.close()
        return None if self._trace is None else write_trace(self.records, self._trace)

    @property
    def _keeps(self) -> bool:
        return self._stats or self._trace is not None

    def _timed(self, operation: Callable[..., Any], name: str, lane: int) -> Callable[..., Any]:
        spans = self.records.spans

        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = operation(*arguments)
            spans.append(Span(name, lane, start, time.perf_counter()))
            return result

        return timed
