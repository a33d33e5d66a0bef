"""benchmarks.transport: what it prints and leaves behind. Its times are nobody's business here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgpack
import psutil
import pytest

from asynctsqp.cores import default_threads
from benchmarks import control_formats, transport_verdicts
from benchmarks.figures import Interval, sign_interval
from benchmarks.transport_exchange import Put, Taken, steps

WAYS = {"ipc-msgpack", "tcp-msgpack", "ipc-frame", "tcp-frame", "shared-memory"}
TIMES = {f"{name}_ms" for name in ("serialise", "send", "receive", "deserialise", "total", "round_trip")}
COMMAND = [sys.executable, "-m", "benchmarks.transport"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what a short run made: stdout, out.json, plot.svg."""
    folder = tmp_path_factory.mktemp("transport")
    options = ["--rounds", "1", "--largest", "4096", "--out", str(folder / "out.json")]
    options += ["--plot", str(folder / "plot.svg")]
    done = subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == ""
    (folder / "stdout").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def results(made: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((made / "out.json").read_text())
    assert report["benchmark"] == "transport"
    assert report["settings"] == {"rounds": 1, "largest": 4096, "threads": default_threads()}
    found: dict[str, Any] = report["results"]
    return found


def test_the_first_line_is_the_floor_and_the_last_the_json(made: Path) -> None:
    lines = (made / "stdout").read_text().splitlines()
    assert lines[0].startswith("floor:")
    assert "GB/s" in lines[0]
    assert json.loads(lines[-1]) == json.loads((made / "out.json").read_text())


def test_every_way_is_measured_at_every_size(results: dict[str, Any]) -> None:
    assert [row["bytes"] for row in results["sizes"]] == [256, 1024, 4096]
    for row in results["sizes"]:
        assert row["ways"].keys() == WAYS
        for way in row["ways"].values():
            assert way.keys() == {*TIMES, "samples", "round_trip_of_rounds_ms"}
            assert all(way[name] >= 0 for name in TIMES)
            assert len(way["round_trip_of_rounds_ms"]) == 1
            assert way["samples"] > 0
    assert results["memcpy_bytes_per_s"] > 0
    assert results["predecessor_ms"]["total"] == 21.2


def test_the_steps_of_one_exchange_are_its_total() -> None:
    """In ns, written down by hand: a message on its way, and one that is there before its sender has gone on."""
    apart = steps(Put(10_000, 12_000, 15_000), Taken(20_000, 27_000))
    early = steps(Put(10_000, 12_000, 35_000), Taken(20_000, 27_000))
    assert list(apart.values()) == pytest.approx([0.002, 0.003, 0.005, 0.007, 0.017])
    assert list(early.values()) == pytest.approx([0.002, 0.008, 0.0, 0.007, 0.017])


def test_what_was_not_measured_is_not_judged(results: dict[str, Any]) -> None:
    assert [(one["messages"], len(one["sizes"])) for one in results["ipc_against_tcp"]] == [
        ("msgpack", 0),
        ("msgpack", 1),
        ("frame", 0),
        ("frame", 1),
    ]
    for one in results["ipc_against_tcp"]:
        assert (one["confirmed"] is None) == (not one["sizes"])
    assert [one["confirmed"] is None for one in results["shared_memory"]] == [False, True]


def test_four_control_formats_are_compared(results: dict[str, Any]) -> None:
    assert len({one["format"] for one in results["control"]}) == 4
    for one in results["control"]:
        assert one["bytes"] > 0
        assert one["encode_us"] >= 0
        assert one["decode_us"] >= 0


def test_the_picture_is_drawn(made: Path) -> None:
    assert "</svg>" in (made / "plot.svg").read_text()


LARGEST = (2**64 - 1, 255, 65535, 2**32 - 1, 2**32 - 1, 255, 255)  # of each field in every format


@pytest.mark.parametrize("form", control_formats.formats(), ids=lambda form: form.name)
@pytest.mark.parametrize("values", [control_formats.SAMPLE, (0,) * 7, LARGEST])
def test_a_control_format_keeps_all_fields(form: control_formats.Format, values: tuple[int, ...]) -> None:
    assert form.decode(form.encode(values)) == values


def test_the_headers_are_what_others_write() -> None:
    """msgpack's own library for the first two, the wire format's documentation for protobuf."""
    ours, mapped, protobuf, _ = (form.encode((1, 2, 3, 4, 5, 6, 7)) for form in control_formats.formats())
    assert msgpack.unpackb(ours) == [3, 1, 2, 3, 4, 5, 6, 7, None]
    assert list(msgpack.unpackb(mapped).values()) == [1, 2, 3, 4, 5, 6, 7]
    assert protobuf == bytes(byte for field in range(1, 8) for byte in (field << 3, field))


def way(*rounds_ms: float) -> dict[str, Any]:
    """Of the given round trips; the median is the middle one."""
    middle = sorted(rounds_ms)[len(rounds_ms) // 2]
    return {"round_trip_ms": middle, "round_trip_of_rounds_ms": list(rounds_ms), "serialise_ms": 0.4}


def row(count: int, ipc: float, *tcp: float, read: float = 0.5) -> dict[str, Any]:
    messages = {f"ipc-{kind}": way(*[ipc] * len(tcp)) for kind in ("msgpack", "frame")}
    messages |= {f"tcp-{kind}": way(*tcp) for kind in ("msgpack", "frame")}
    return {"bytes": count, "ways": messages | {"shared-memory": way(1.0) | {"deserialise_ms": read}}}


@pytest.mark.parametrize(
    ("large", "small", "confirmed", "certain"),
    [
        ((10.0, 10.1, 10.0, 10.1), (1.0, 20.0, 21.0, 22.0), True, True),
        ((10.0, 9.9, 9.9, 9.9), (50.0, 1.0, 1.0, 1.0), True, True),
        ((10.0, 9.0, 10.1, 12.0), (1.0, 5.0, 20.0, 30.0), True, False),
        ((10.0, 10.3, 10.4, 10.5), (1.0, 1.2, 1.1, 1.3), False, True),
        ((10.0, 9.0, 11.0, 12.0), (1.0, 1.2, 1.3, 12.0), False, False),
    ],
)
def test_the_claims_are_judged_by_the_figures(
    large: tuple[float, ...], small: tuple[float, ...], confirmed: bool, certain: bool
) -> None:
    def verdicts(times: int) -> list[dict[str, Any]]:
        few = row(256, small[0], *small[1:] * times), row(10 << 20, large[0], *large[1:] * times)
        return transport_verdicts.ipc_against_tcp([*few, row(4096, 1.0, 5.0)])

    assert [(one["confirmed"], one["certain"]) for one in verdicts(3)] == [(confirmed, certain)] * 4
    assert [(one["confirmed"], one["certain"]) for one in verdicts(1)] == [(confirmed, False)] * 4
    assert [[size["bytes"] for size in one["sizes"]] for one in verdicts(1)] == [[10 << 20], [256]] * 2


@pytest.mark.parametrize(("read", "expected"), [(0.5, True), (0.7, False)])
def test_the_target_of_shared_memory_is_judged_by_the_figures(read: float, expected: bool) -> None:
    alone = {"write_ms": 0.4, "read_ms": read}
    verdicts = transport_verdicts.shared_memory([row(8 << 20, 1, 1, read=read)], alone)
    assert [one["confirmed"] for one in verdicts] == [expected] * 2


def test_a_single_round_has_an_interval() -> None:
    assert sign_interval([1.5]) == Interval(1.5, 1.5, 0.0)


def test_nothing_outlives_a_run_that_is_killed(tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    parent = psutil.Popen([*COMMAND, "--rounds", "100000"], stdout=subprocess.DEVNULL, env=environment)
    try:
        child = _child_with_region(parent)
    finally:
        parent.kill()
        parent.wait()
    child.wait(timeout=30)
    assert not list(tmp_path.iterdir())


def _child_with_region(parent: psutil.Popen) -> psutil.Process:
    """Once it has mapped shared memory whose name is gone."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for child in parent.children():
            maps = Path(f"/proc/{child.pid}/maps").read_text().splitlines()
            if any("/dev/shm/asynctsqp-" in line and line.endswith("(deleted)") for line in maps):
                return child
        time.sleep(0.05)
    raise TimeoutError("no child with a region")


@pytest.mark.parametrize(
    ("options", "word"),
    [(["--rounds", "0"], "--rounds"), (["--largest", "255"], "--largest"), (["--threads", "0"], "--threads")],
)
def test_what_makes_no_sense_is_refused_in_one_line(options: list[str], word: str) -> None:
    done = subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert word in done.stderr
    assert done.stderr.count("\n") == 1
