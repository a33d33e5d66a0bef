"""The offset between the two clocks, against trying all offsets."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asynctsqp.reports.clock import ClockOffset, computations, offset_of
from asynctsqp.reports.records import RpcRecord
from tests import timelines
from tests.timelines import call, offset_by_trying, window


def test_no_call_tells_nothing() -> None:
    assert offset_of([]) == ClockOffset(offset_s=0.0, error_s=None)
    assert computations([], offset_of([])).shape == (0, 2)


def test_two_calls_by_hand() -> None:
    """Sent at 11, read at 21, 6 s of computation that began at 1: the offset is 10 to 14. The second says 12 to 19."""
    first = call(start_at=10.0, encode_s=1.0, send_s=2.0, wait_s=8.0, gpu_start_at=1.0, gpu_s=6.0)
    second = call(start_at=32.0, wait_s=10.0, gpu_start_at=20.0, gpu_s=3.0)
    assert offset_of([first]) == ClockOffset(12.0, 2.0)
    assert offset_of([first, second]) == ClockOffset(13.0, 1.0)


def test_contradictions_fall_back_to_the_tightest_call() -> None:
    tight = call(start_at=0.0, wait_s=4.0, gpu_start_at=100.0, gpu_s=2.0)
    loose = call(start_at=0.0, wait_s=9.0, gpu_start_at=0.0, gpu_s=1.0)
    assert offset_of([loose, tight]) == ClockOffset(-99.0, 1.0)


def test_a_duration_without_room_is_no_bound() -> None:
    assert offset_of([call(start_at=5.0, wait_s=4.0, gpu_start_at=1.0, gpu_s=1e300)]) == ClockOffset(6.0, 2.0)


@given(st.lists(timelines.calls, min_size=1, max_size=8))
def test_as_found_by_trying_all_offsets(calls: list[RpcRecord]) -> None:
    offset, error = offset_by_trying(calls)
    clock = offset_of(calls)
    assert clock.offset_s == offset
    assert clock.error_s == pytest.approx(error, abs=1e-12)


@given(st.lists(timelines.calls, min_size=1, max_size=8), st.integers(-40, 40), st.data())
def test_an_honest_side_is_within_the_error(calls: list[RpcRecord], offset: int, data: st.DataObject) -> None:
    honest = []
    for record in calls:
        sent, read = window(record)
        begin = data.draw(st.floats(sent, read))
        seconds = data.draw(st.floats(0, read - begin))
        claim = {"gpu_start_at": begin - offset, "gpu_s": seconds}
        honest.append(call(**{**timelines.fields(record), **claim}))
    clock = offset_of(honest)
    assert clock.error_s is not None
    assert abs(clock.offset_s - offset) <= clock.error_s + 1e-9


@given(st.lists(timelines.lies, min_size=1, max_size=8))
def test_lies_stay_finite_and_within_their_calls(calls: list[RpcRecord]) -> None:
    clock = offset_of(calls)
    assert math.isfinite(clock.offset_s)
    assert clock.error_s is not None
    assert 0 < clock.error_s < math.inf
    for record, (begin, end) in zip(calls, computations(calls, clock), strict=True):
        sent, read = window(record)
        assert sent <= begin <= end <= read


def test_a_far_clock_is_not_told_more_exactly_than_a_float_can() -> None:
    clock = offset_of([call(start_at=0.0, wait_s=1e-6, gpu_start_at=1e300)])
    assert clock.error_s is not None
    assert clock.error_s >= math.ulp(1e300)
