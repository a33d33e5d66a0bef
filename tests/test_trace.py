"""The timeline: read back as JSON, and held to what its format asks."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asynctsqp.errors import BadInputError
from asynctsqp.reports.records import Records, Span
from asynctsqp.reports.trace import write_trace
from tests import timelines
from tests.timelines import call, records

Event = dict[str, Any]

runs = st.builds(records, st.lists(timelines.calls | timelines.lies, max_size=8), st.lists(timelines.spans, max_size=8))


@pytest.fixture(scope="session")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trace") / "trace.json"


def nanoseconds(event: Event) -> tuple[int, int]:
    begin, seconds = round(event["ts"] * 1e3), round(event["dur"] * 1e3)
    assert begin >= 0
    assert seconds >= 0
    return begin, begin + seconds


def of(events: list[Event], *phases: str) -> list[Event]:
    return [event for event in events if event["ph"] in phases]


def assert_slices_nest(events: list[Event]) -> None:
    """Any two slices of a track lie apart, or one within the other."""
    tracks = defaultdict(list)
    for event in of(events, "X"):
        tracks[event["pid"], event["tid"]].append(nanoseconds(event))
    for slices in tracks.values():
        for (a, b), (c, d) in combinations(slices, 2):
            assert b <= c or d <= a or (a <= c and d <= b) or (c <= a and b <= d), ((a, b), (c, d))


def assert_flights_close(events: list[Event]) -> None:
    """The events of each id, in their order, open and close like brackets, and time does not go back."""
    flights = defaultdict(list)
    for event in of(events, "b", "e"):
        flights[event["cat"], event["id"], event["pid"]].append(event)
    for flight in flights.values():
        assert [event["ts"] for event in flight] == sorted(event["ts"] for event in flight)
        open_names = []
        for event in flight:
            if event["ph"] == "b":
                open_names.append(event["name"])
            else:
                assert open_names.pop() == event["name"]
        assert open_names == []


def assert_arrows_go_forward(events: list[Event]) -> None:
    begins = {(event["pid"], event["tid"], event["ts"]) for event in of(events, "X")}
    tails = {event["id"]: event for event in of(events, "s")}
    heads = {event["id"]: event for event in of(events, "f")}
    assert tails.keys() == heads.keys()
    for id, tail in tails.items():
        head = heads[id]
        assert tail["ts"] <= head["ts"]
        assert head["bp"] == "e"
        assert {(end["pid"], end["tid"], end["ts"]) for end in (tail, head)} <= begins


@given(runs)
def test_any_run_makes_a_valid_timeline(file: Path, run: Records) -> None:
    clock = write_trace(run, file)
    trace = json.loads(file.read_text())
    events = trace["traceEvents"]
    assert_slices_nest(events)
    assert_flights_close(events)
    assert_arrows_go_forward(events)
    assert len(of(events, "X")) == len(run.spans) + 4 * len(run.rpcs)
    assert len(of(events, "b")) == 3 * len(run.rpcs)
    assert trace["otherData"] == {"clock_offset_s": clock.offset_s, "clock_offset_error_s": clock.error_s}
    if run.rpcs or run.spans:
        assert min(event["ts"] for event in of(events, "X", "b")) == 0
    named = {(event["pid"], event["tid"]) for event in of(events, "M") if event["name"] == "thread_name"}
    assert {(event["pid"], event["tid"]) for event in of(events, "X")} == named


def test_a_run_by_hand(tmp_path: Path) -> None:
    """Two calls of one lane in flight at once; both sides' clocks 100 s apart, known to half a second."""
    one = call(start_at=1.0, encode_s=1.0, send_s=1.0, wait_s=4.0, decode_s=1.0, gpu_start_at=-98.0, gpu_s=4.0)
    two = call(start_at=3.0, encode_s=1.0, wait_s=5.0, decode_s=1.0, slot=1, gpu_start_at=-95.0, gpu_s=1.0)
    clock = write_trace(records([one, two], [Span("RMSNORM", 0, 0.5, 1.0)]), tmp_path / "t.json")
    assert (clock.offset_s, clock.error_s) == (100.5, 0.5)
    trace = json.loads((tmp_path / "t.json").read_text())
    events = trace["traceEvents"]
    names = {(event["pid"], event["name"]): event["args"]["name"] for event in of(events, "M")}
    assert names[1, "process_name"] == "TEE side"
    assert names[2, "process_name"] == "GPU side"
    tee = [event for event in of(events, "X") if event["pid"] == 1]
    assert len({event["tid"] for event in tee}) == 1  # what one thread does fits one track
    seconds = [(event["name"], event["ts"] / 1e6, event["dur"] / 1e6) for event in tee]
    assert ("RMSNORM", 0.0, 0.5) in seconds
    assert ("encode", 0.5, 1.0) in seconds
    assert ("decode", 6.5, 1.0) in seconds
    gpu = [(event["ts"] / 1e6, event["dur"] / 1e6) for event in of(events, "X") if event["pid"] == 2]
    assert gpu == [(2.0, 4.0), (5.0, 1.0)]
    waits = [(event["ph"], event["ts"] / 1e6) for event in of(events, "b", "e") if event["name"] == "wait"]
    assert waits == [("b", 2.5), ("e", 6.5), ("b", 3.5), ("e", 8.5)]


def test_slices_that_cross_get_another_track(tmp_path: Path) -> None:
    write_trace(records([], [Span("A", 0, 0.0, 2.0), Span("B", 0, 1.0, 3.0)]), tmp_path / "t.json")
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert len({event["tid"] for event in of(events, "X")}) == 2
    assert {"lane 0", "lane 0 (2)"} <= {event["args"]["name"] for event in of(events, "M")}


@pytest.mark.parametrize("name", ["no-such-directory/t.json", ".", "a\0b"])
def test_a_file_that_cannot_be_opened(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInputError, match=r"^cannot write the trace to .*$"):
        write_trace(Records(), tmp_path / name)


def test_a_full_disk() -> None:
    with pytest.raises(BadInputError, match=r"^cannot write the trace to '/dev/full': No space left"):
        write_trace(records([call()], []), Path("/dev/full"))
