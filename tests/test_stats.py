"""The timing statistics, against an attribution moment by moment."""

from __future__ import annotations

import io
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from asynctsqp.reports import stats_table
from asynctsqp.reports.category import Category
from asynctsqp.reports.records import Records, RpcRecord, Span
from asynctsqp.reports.stats import Stats, stats_of
from tests import timelines
from tests.timelines import call, computed_by_trying, offset_by_trying, records

STEP = 0.5  # all boundaries of a made-up run lie on this grid
Interval = tuple[float, float]

runs = st.builds(records, st.lists(timelines.calls, max_size=8), st.lists(timelines.spans, max_size=8))
walls = st.tuples(st.integers(0, 40), st.integers(0, 40)).map(lambda ends: (float(ends[0]), float(sum(ends))))


def phases(record: RpcRecord) -> dict[str, Interval]:
    at, found = record.start_at, {}
    for name in ("encode", "send", "wait", "receive", "decode"):
        found[name] = (at, at + getattr(record, name + "_s"))
        at = found[name][1]
    return found


def running(intervals: list[Interval], moment: float) -> bool:
    return any(begin < moment < end for begin, end in intervals)


class Moments:
    """What goes on at each moment, found by looking at it."""

    def __init__(self, run: Records, start_at: float, end_at: float) -> None:
        self.middles = [start_at + STEP * (k + 0.5) for k in range(round((end_at - start_at) / STEP))]
        self.tee = [(span.start_at, span.end_at) for span in run.spans]
        calls = [phases(record) for record in run.rpcs]
        self.serialisation = [call[name] for call in calls for name in ("encode", "decode")]
        self.messaging = [call[name] for call in calls for name in ("send", "receive")]
        offset = offset_by_trying(run.rpcs)[0] if run.rpcs else 0.0
        self.gpu = [computed_by_trying(record, offset) for record in run.rpcs]
        self.flight = [(record.start_at, phases(record)["decode"][1]) for record in run.rpcs]

    def category(self, moment: float) -> Category:
        if running(self.tee, moment):
            return Category.TEE
        if running(self.serialisation, moment):
            return Category.SERIALISATION
        if running(self.messaging, moment):
            return Category.MESSAGING
        if running(self.gpu, moment):
            return Category.GPU
        return Category.WIRE if running(self.flight, moment) else Category.PYTHON

    def seconds(self, category: Category) -> float:
        return STEP * sum(self.category(moment) is category for moment in self.middles)

    def busy(self, intervals: list[Interval]) -> float:
        return STEP * sum(running(intervals, moment) for moment in self.middles)

    def hidden(self) -> float:
        at_work = self.tee + self.serialisation + self.messaging
        return STEP * sum(running(self.gpu, m) and running(at_work, m) for m in self.middles)


@given(runs, walls)
def test_totals_are_what_each_moment_belongs_to(run: Records, wall: Interval) -> None:
    stats, moments = stats_of(run, *wall), Moments(run, *wall)
    assert {t.name: t.total_s for t in stats.totals} == pytest.approx(
        {category.value: moments.seconds(category) for category in Category}, abs=1e-9
    )
    assert stats.overlap.gpu_busy_s == pytest.approx(moments.busy(moments.gpu), abs=1e-9)
    assert stats.overlap.gpu_hidden_s == pytest.approx(moments.hidden(), abs=1e-9)
    assert stats.overlap.rpc_busy_s == pytest.approx(moments.busy(moments.flight), abs=1e-9)


@given(runs, walls)
def test_rows_are_what_each_operation_took_within_the_wall_time(run: Records, wall: Interval) -> None:
    stats, moments = stats_of(run, *wall), Moments(run, *wall)
    in_flight = sum(moments.busy([interval]) for interval in moments.flight)
    serialised = sum(moments.busy([interval]) for interval in moments.serialisation)
    rows = {row.name: row for row in stats.communication}
    assert rows["RPC calls"].total_s == stats.overlap.rpc_total_s == pytest.approx(in_flight, abs=1e-9)
    assert rows["serialisation"].total_s == pytest.approx(serialised, abs=1e-9)
    for name in {span.name for span in run.spans}:
        expected = sum(moments.busy([(s.start_at, s.end_at)]) for s in run.spans if s.name == name)
        assert sum(r.total_s for r in stats.tee if r.name == name) == pytest.approx(expected, abs=1e-9)
    for name in {record.method for record in run.rpcs}:
        computed = [gpu for gpu, record in zip(moments.gpu, run.rpcs, strict=True) if record.method == name]
        expected = sum(moments.busy([interval]) for interval in computed)
        assert sum(r.total_s for r in stats.gpu if r.name == name) == pytest.approx(expected, abs=1e-9)


@given(
    st.builds(records, st.lists(timelines.lies, max_size=8), st.lists(timelines.spans, max_size=8)),
    st.floats(-10, 60),
    st.floats(0, 60),
)
def test_lies_change_no_sum(run: Records, start_at: float, seconds: float) -> None:
    stats = stats_of(run, start_at, start_at + seconds)
    assert sum(total.total_s for total in stats.totals) == pytest.approx(stats.wall_s, abs=1e-9)
    rows = (*stats.communication, *stats.gpu, *stats.tee)
    figures = [value for row in rows for value in (row.total_s, row.average_s, row.share)]
    figures += [value for total in stats.totals for value in (total.total_s, total.share)]
    figures += msgspec.structs.astuple(stats.overlap)
    assert all(0 <= figure < math.inf for figure in figures)
    msgspec.json.decode(msgspec.json.encode(stats), type=Stats)


def by_hand() -> Stats:
    """10 s: RMSNORM 0-1; a call 1-7 (encode 1, send 1, wait 2.5 of which 2 computing, receive .5, decode 1);
    SILU 4-5, in the wait; nothing after 7."""
    one = call(start_at=1.0, encode_s=1.0, send_s=1.0, wait_s=2.5, receive_s=0.5, decode_s=1.0, bytes_sent=2 << 20)
    # 3.5 s of room for a computation of 2.5 s that began at 0: the offset is 2 to 3
    run = records(
        [msgspec.structs.replace(one, gpu_start_at=0.0, gpu_s=2.5)],
        [Span("RMSNORM", 0, 0.0, 1.0), Span("SILU", 0, 4.0, 5.0)],
    )
    return stats_of(run, 0.0, 10.0)


def test_a_run_by_hand() -> None:
    stats = by_hand()
    assert (stats.clock.offset_s, stats.clock.error_s) == (2.5, 0.5)
    assert {t.name: (t.total_s, t.share) for t in stats.totals} == {
        "TEE compute": (2.0, 0.2),
        "serialisation": (2.0, 0.2),
        "messaging": (1.5, 0.15),
        "waiting for GPU compute": (1.0, 0.1),  # 2.5 to 5: behind the send until 3, behind SILU from 4
        "waiting for communication": (0.5, 0.05),
        "Python and event loop": (3.0, 0.3),
    }
    assert msgspec.structs.astuple(stats.overlap) == (2.5, 1.5, 6.0, 6.0)
    assert [msgspec.structs.astuple(row) for row in stats.gpu] == [("QKV", 1, 2.5, 2.5, 0.25)]
    assert [row.name for row in stats.tee] == ["RMSNORM", "SILU"]
    assert (stats.bytes_sent, stats.bytes_received) == (2 << 20, 0)


def test_what_lies_outside_the_wall_time_is_not_counted() -> None:
    calls = [call(start_at=at, wait_s=2.0, bytes_sent=1) for at in (0.0, 2.0, 5.0, 9.0)]
    spans = [Span("SILU", 0, at, at + 1.0) for at in (0.0, 4.0, 8.0)]
    stats = stats_of(records(calls, spans), 3.0, 6.0)
    assert [(row.count, row.total_s) for row in stats.gpu] == [(2, 0.0)]
    assert [(row.count, row.total_s) for row in stats.tee] == [(1, 1.0)]
    assert {row.count for row in stats.communication} == {2}
    assert stats.bytes_sent == 2


def test_nothing_happened() -> None:
    stats = stats_of(Records(), 3.0, 3.0)
    assert stats.wall_s == 0
    assert stats.advice == ()
    assert stats.clock.error_s is None
    assert stats_of(Records(), 3.0, 5.0).totals[-1].total_s == 2


def advice_of(**fields: float | str | int) -> str:
    return " ".join(stats_of(records([call(**fields)], []), 0.0, 10.0).advice)


def test_the_advice_acts_on_the_largest_part() -> None:
    assert "--partition fused" in advice_of()
    assert "--doorbell on" in advice_of(wait_s=9.455, bytes_sent=1000)
    assert "94.55 %" in advice_of(wait_s=9.455, bytes_sent=1000)
    assert "--doorbell" not in advice_of(wait_s=9.0, bytes_sent=1000, transport="doorbell")
    assert "--transport shm" in advice_of(wait_s=9.0, bytes_sent=1000, transport="binary")
    assert "--compress" in advice_of(wait_s=9.0, bytes_sent=1 << 30, transport="binary")
    assert "--dtype bfloat16" in advice_of(encode_s=9.0, bytes_sent=1 << 30)
    assert "--device cuda" in advice_of(wait_s=9.0, gpu_s=9.0)
    assert "--lanes" in " ".join(stats_of(records([], [Span("ATTENTION", 0, 0.0, 9.0)]), 0.0, 10.0).advice)
    assert "Warning" not in advice_of(wait_s=9.0, gpu_s=9.0)


def test_the_table_shows_all_sections() -> None:
    stats = by_hand()
    out = io.StringIO()
    stats_table.show(stats, Console(file=out, width=80))
    shown = out.getvalue()
    for words in ("Communication", "GPU operations", "TEE operations", "Totals", "RMSNORM", "QKV", *stats.advice):
        assert words in shown
    total = next(line for line in shown.splitlines() if "wall time" in line)
    assert "10000.00" in total
    assert "100.00 %" in total
    assert max(map(len, shown.split("Totals")[0].splitlines())) <= 80


def test_names_are_no_markup() -> None:
    run = records([], [Span("[red]x[/red]", 0, 0.0, 1.0)])
    out = io.StringIO()
    stats_table.show(stats_of(run, 0.0, 1.0), Console(file=out, width=80))
    assert "[red]x[/red]" in out.getvalue()
