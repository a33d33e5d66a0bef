"""A timeline of a run for https://ui.perfetto.dev or chrome://tracing.

The format is the "Trace Event Format" of Chrome's tracing: "X" are slices of a thread's track, which must nest;
"b" and "e" are a call in flight, of which a lane may have several; "s" and "f" are the ends of an arrow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import msgspec

from asynctsqp.reports.clock import ClockOffset, computations, offset_of
from asynctsqp.reports.output_file import cannot_write, open_output
from asynctsqp.reports.phases import DECODE, ENCODE, PHASES, RECEIVE, SEND, WAIT, boundaries
from asynctsqp.reports.records import Records, RpcRecord, Span
from asynctsqp.reports.trace_tracks import rows_of

TEE, GPU = 1, 2  # process ids
PROCESSES = {TEE: "TEE side", GPU: "GPU side"}

Event: TypeAlias = dict[str, Any]


class _Slice(NamedTuple):
    """What one lane of one side does; times in nanoseconds from the first event."""

    process: int
    lane: int
    begin: int
    end: int
    name: str
    args: dict[str, Any]
    arrow: str = ""  # "s" or "f": an arrow with this end begins here
    call: int = -1


def write_trace(records: Records, file: Path) -> ClockOffset:
    """Writes the timeline; returns by how much the GPU side's times were moved, and the error of that.

    Raises BadInputError where the file cannot be written.
    """
    rpcs, spans = list(records.rpcs), list(records.spans)  # another thread may still add to them
    clock = offset_of(rpcs)
    out = open_output(file, "the trace")
    try:
        with out:
            _write(out, clock, _events(rpcs, spans, clock))
    except OSError as error:
        raise cannot_write(file, "the trace", error) from None
    return clock


def _write(out: BinaryIO, clock: ClockOffset, events: Iterator[Event]) -> None:
    """Event by event: a long run has millions."""
    encode = msgspec.json.Encoder().encode
    about = {"clock_offset_s": clock.offset_s, "clock_offset_error_s": clock.error_s}
    out.write(b'{"displayTimeUnit":"ns","otherData":' + encode(about) + b',"traceEvents":[\n')
    out.write(encode(_process_name(TEE)))  # the one event without a comma before it
    for event in events:
        out.write(b",\n" + encode(event))
    out.write(b"\n]}\n")


def _events(rpcs: Sequence[RpcRecord], spans: Sequence[Span], clock: ClockOffset) -> Iterator[Event]:
    yield _process_name(GPU)
    first_at = min([rpc.start_at for rpc in rpcs] + [span.start_at for span in spans], default=0.0)
    # Rows of six and of two: the boundaries of each call's phases, and of its computation.
    calls = _nanoseconds(boundaries(rpcs).tolist(), first_at)
    gpu = _nanoseconds(computations(rpcs, clock).tolist(), first_at)
    own = _nanoseconds([[span.start_at, max(span.start_at, span.end_at)] for span in spans], first_at)

    slices = [_Slice(TEE, s.lane, begin, end, s.name, {}) for s, (begin, end) in zip(spans, own, strict=True)]
    for call, (rpc, times, computed) in enumerate(zip(rpcs, calls, gpu, strict=True)):
        slices += _call_slices(call, rpc, times, computed)
        yield from _flight(call, rpc, times)
    yield from _tracks(slices)


def _process_name(process: int) -> Event:
    return {"name": "process_name", "ph": "M", "pid": process, "tid": 0, "args": {"name": PROCESSES[process]}}


def _nanoseconds(rows: Iterable[Iterable[float]], first_at: float) -> list[list[int]]:
    return [[round((at - first_at) * 1e9) for at in row] for row in rows]


def _call_slices(call: int, rpc: RpcRecord, times: Sequence[int], computed: Sequence[int]) -> Iterator[_Slice]:
    """What the TEE side's thread does for a call, and what the GPU side does."""
    args = {"call": call, "method": rpc.method, "layer": rpc.layer, "slot": rpc.slot}
    for index, arrow in ((ENCODE, ""), (SEND, "s"), (DECODE, "")):
        yield _Slice(TEE, rpc.lane, times[index], times[index + 1], PHASES[index], args, arrow, call)
    yield _Slice(GPU, rpc.lane, computed[0], computed[1], rpc.method, args, "f", call)


def _flight(call: int, rpc: RpcRecord, times: Sequence[int]) -> Iterator[Event]:
    """The call as a whole, and within it the wait and the way back to who asked."""
    common = {"cat": "call", "id": hex(call), "pid": TEE, "tid": 0}
    args = {"layer": rpc.layer, "lane": rpc.lane, "slot": rpc.slot, "transport": rpc.transport}
    args |= {"bytes_sent": rpc.bytes_sent, "bytes_received": rpc.bytes_received}
    yield {"name": rpc.method, "ph": "b", "ts": times[0] / 1e3, "args": args, **common}
    for index in (WAIT, RECEIVE):
        yield {"name": PHASES[index], "ph": "b", "ts": times[index] / 1e3, **common}
        yield {"name": PHASES[index], "ph": "e", "ts": times[index + 1] / 1e3, **common}
    yield {"name": rpc.method, "ph": "e", "ts": times[-1] / 1e3, **common}


def _tracks(slices: Iterable[_Slice]) -> Iterator[Event]:
    """Each lane's slices on its track, and those that cross them on another of that lane."""
    lanes: dict[tuple[int, int], list[_Slice]] = {}
    for piece in slices:
        lanes.setdefault((piece.process, piece.lane), []).append(piece)
    track = 0
    for (process, lane), pieces in sorted(lanes.items()):
        rows = rows_of([(piece.begin, piece.end) for piece in pieces])
        for row in range(max(rows) + 1):
            name = f"lane {lane}" + (f" ({row + 1})" if row else "")
            yield {"name": "thread_name", "ph": "M", "pid": process, "tid": track + row + 1, "args": {"name": name}}
        for piece, row in zip(pieces, rows, strict=True):
            yield from _slice_events(piece, track + row + 1)
        track += max(rows) + 1


def _slice_events(piece: _Slice, track: int) -> Iterator[Event]:
    where = {"ts": piece.begin / 1e3, "pid": piece.process, "tid": track}
    yield {"name": piece.name, "ph": "X", "dur": (piece.end - piece.begin) / 1e3, "args": piece.args, **where}
    if piece.arrow:
        end = {"bp": "e"} if piece.arrow == "f" else {}  # to the slice that begins here, not to the next one
        yield {"name": "call", "cat": "arrow", "ph": piece.arrow, "id": hex(piece.call), **end, **where}
