"""The log of calls: what is written comes back, and what was not written by it is refused in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asynctsqp.errors import BadInputError
from asynctsqp.reports.output_file import BUFFER_BYTES
from asynctsqp.reports.records import RpcRecord
from asynctsqp.reports.rpc_log import MAX_LINE_BYTES, RpcLog, read_log
from tests import timelines
from tests.timelines import CALL, call


def no_note(line: str) -> None:
    pytest.fail(f"a note: {line}")


def line(**fields: object) -> str:
    return json.dumps({**CALL, **fields}) + "\n"


@pytest.fixture(scope="session")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "rpc.jsonl"


@given(st.lists(timelines.calls, min_size=1, max_size=8))
def test_what_is_written_comes_back(file: Path, calls: list[RpcRecord]) -> None:
    with RpcLog(file) as log:
        for record in calls:
            log.write(record)
    assert read_log(file, no_note) == calls
    assert [json.loads(text) for text in file.read_text().splitlines()] == [timelines.fields(r) for r in calls]


def test_the_file_is_there_before_the_first_call(tmp_path: Path) -> None:
    with RpcLog(tmp_path / "log"):
        assert (tmp_path / "log").read_bytes() == b""


@pytest.mark.parametrize("name", ["no-such-directory/log", ".", "a\0b"])
def test_a_file_that_cannot_be_opened(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInputError, match=r"^cannot write the RPC log to .*$"):
        RpcLog(tmp_path / name)


def test_a_full_disk_is_told_when_it_is_met() -> None:
    log = RpcLog(Path("/dev/full"))
    log.write(call())
    with pytest.raises(BadInputError, match=r"^cannot write the RPC log to '/dev/full': No space left"):
        log.close()
    log.close()


def test_a_full_disk_in_the_middle_of_a_run() -> None:
    log = RpcLog(Path("/dev/full"))
    long = call(method="x" * BUFFER_BYTES)  # does not wait in the buffer
    with pytest.raises(BadInputError, match="No space left"):
        log.write(long)
    log.close()


@pytest.mark.parametrize(
    "damage",
    [
        "not JSON\n",
        "\n",
        "[]\n",
        "{}\n",
        '"text"\n',
        "1e999\n",
        "[" * 5000 + "\n",
        line(layer="one"),
        line(method=None),
        line(wait_s="soon"),
        line(wait_s=True),
        line(slot=0.5),
        line(slot=None),
        line(extra="x" * MAX_LINE_BYTES),
        "x" * (2 * MAX_LINE_BYTES),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, damage: str) -> None:
    (tmp_path / "log").write_text(line() + damage + line())
    with pytest.raises(BadInputError, match=r"^'.*log', line 2, is not a record of a call: .+$") as error:
        read_log(tmp_path / "log", no_note)
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b'{"method": "\xff\xfe"}\n')
    with pytest.raises(BadInputError, match="line 1"):
        read_log(tmp_path / "log", no_note)


def test_a_cut_last_line_is_left_out_with_a_note(tmp_path: Path) -> None:
    notes: list[str] = []
    for cut in (1, 10, len(line()) - 2):
        (tmp_path / "log").write_text(line() + line()[:cut])
        assert read_log(tmp_path / "log", notes.append) == [call()]
    assert len(notes) == 3
    assert all("line 2" in note for note in notes)


def test_a_whole_last_line_needs_no_newline(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(line() + line().rstrip("\n"))
    assert read_log(tmp_path / "log", no_note) == [call(), call()]


@pytest.mark.parametrize("name", ["missing", ".", "a\0b"])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInputError, match=r"^cannot read the RPC log .*$"):
        read_log(tmp_path / name, no_note)


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    with pytest.raises(BadInputError, match=r"holds no calls: .*--log-rpc"):
        read_log(tmp_path / "log", no_note)


def test_what_is_not_finite_becomes_a_number(tmp_path: Path) -> None:
    with RpcLog(tmp_path / "log") as log:
        log.write(call(gpu_start_at=math.nan, gpu_s=math.inf, wait_s=2.0))
        log.write(call(gpu_start_at=-1.7e308, gpu_s=1.7e308, wait_s=-2.0))
    first, second = read_log(tmp_path / "log", no_note)
    assert (first.gpu_start_at, first.gpu_s, first.wait_s) == (0.0, 0.0, 2.0)
    assert (second.gpu_start_at, second.gpu_s, second.wait_s) == (-1e15, 1e15, 0.0)


def test_names_can_be_shown(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(line(method="\x1b[2J" + "x" * 999, transport="a\nb"))
    (record,) = read_log(tmp_path / "log", no_note)
    assert record.method == "?[2J" + "x" * 36
    assert record.transport == "a b"
    assert msgspec.json.encode(record)
