"""`python -m asynctsqp.report`: figures by hand from a small log, pictures, and errors of one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from asynctsqp.reports.records import RpcRecord
from asynctsqp.reports.rpc_log import RpcLog
from tests.processes import ROOT, Ended, assert_one_error, run_main
from tests.timelines import call

MAGIC = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}

# Two calls of QKV, 8 and 12 ms, and one of DOWN, 22 ms.
CALLS = [
    call(
        method="QKV",
        transport="doorbell",
        bytes_sent=1000,
        bytes_received=3000,
        start_at=10.0,
        encode_s=0.001,
        send_s=0.001,
        wait_s=0.004,
        receive_s=0.001,
        decode_s=0.001,
        gpu_s=0.003,
    ),
    call(
        method="QKV",
        transport="doorbell",
        bytes_sent=1000,
        bytes_received=3000,
        start_at=10.02,
        encode_s=0.003,
        send_s=0.001,
        wait_s=0.006,
        receive_s=0.001,
        decode_s=0.001,
        gpu_s=0.001,
    ),
    call(
        method="DOWN",
        transport="shm",
        bytes_sent=5000,
        bytes_received=5000,
        start_at=10.03,
        send_s=0.004,
        wait_s=0.018,
        gpu_s=7.0,
    ),
]


def write(file: Path, records: list[RpcRecord]) -> str:
    with RpcLog(file) as log:
        for record in records:
            log.write(record)
    return str(file)


@pytest.fixture
def log(tmp_path: Path) -> str:
    return write(tmp_path / "rpc.jsonl", CALLS)


def run_report(*flags: str) -> Ended:
    from asynctsqp.report import main

    return run_main(main, *flags)


def process(*flags: str, **options: Any) -> Ended:
    command = [sys.executable, "-m", "asynctsqp.report", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, **options)
    return Ended(done.returncode, done.stdout, done.stderr)


def assert_error(ended: Ended, *words: str) -> None:
    assert_one_error(ended, 2, *words, program="asynctsqp.report")
    assert ended.out == ""


def test_the_figures_by_hand(log: str) -> None:
    ended = process(log, "--json")
    assert (ended.code, ended.err) == (0, "")
    report = json.loads(ended.out)
    assert report["calls"] == 3
    assert report["calls_s"] == pytest.approx(0.042)
    assert report["wall_s"] == pytest.approx(0.052)
    assert report["transports"] == {"doorbell": 2, "shm": 1}
    # the claim of 7 s counts as the 18 ms that were waited: gpu 3 + 1 + 18 of 42 ms
    assert report["bottleneck"] == {
        "phase": "gpu",
        "phase_share": pytest.approx(22 / 42),
        "method": "DOWN",
        "method_share": pytest.approx(22 / 42),
    }
    down, qkv = sorted(report["methods"], key=lambda method: method["name"])
    assert (down["calls"], down["bytes_sent"], down["bytes_received"]) == (1, 5000, 5000)
    assert (qkv["calls"], qkv["bytes_sent"], qkv["bytes_received"]) == (2, 2000, 6000)
    assert qkv["total_s"] == pytest.approx(0.020)
    assert qkv["mb_per_s"] == pytest.approx(8000 / 1e6 / 0.016)
    assert down["mb_per_s"] == pytest.approx(10000 / 1e6 / 0.004)
    assert qkv["phases"]["encode"] == pytest.approx(
        {"total_s": 0.004, "average_s": 0.002, "p50_s": 0.002, "p99_s": 0.00298}
    )
    assert qkv["phases"]["on the way"] == pytest.approx(
        {"total_s": 0.006, "average_s": 0.003, "p50_s": 0.003, "p99_s": 0.00496}
    )
    assert down["phases"]["gpu"]["total_s"] == pytest.approx(0.018)
    assert down["phases"]["on the way"]["total_s"] == 0
    assert "waiting for GPU compute" in " ".join(report["advice"])


def test_the_table(log: str) -> None:
    ended = process(log)
    assert (ended.code, ended.err) == (0, "")
    for words in ("3 calls", "doorbell (2), shm (1)", "QKV", "DOWN", "on the way", "Bottleneck: gpu, 52.4 %"):
        assert words in ended.out
    assert "--dtype bfloat16" in ended.out


@pytest.mark.parametrize("suffix", MAGIC)
def test_the_picture(log: str, tmp_path: Path, suffix: str) -> None:
    ended = run_report(log, "--plot", str(tmp_path / f"plot{suffix}"), "--json")
    assert (ended.code, ended.err) == (0, "")
    assert json.loads(ended.out)["calls"] == 3
    assert (tmp_path / f"plot{suffix}").read_bytes().startswith(MAGIC[suffix])


def test_names_out_of_a_file_are_no_formulas_and_no_markup(tmp_path: Path) -> None:
    log = write(tmp_path / "log", [call(method=r"$\frac[/red]$", wait_s=1.0)])
    ended = run_report(log, "--plot", str(tmp_path / "plot.png"))
    assert ended.code == 0
    assert r"$\frac[/red]$" in ended.out


def test_calls_that_took_no_time(tmp_path: Path) -> None:
    ended = run_report(write(tmp_path / "log", [call()]), "--json", "--plot", str(tmp_path / "plot.svg"))
    report = json.loads(ended.out)
    assert (report["calls_s"], report["methods"][0]["mb_per_s"], report["advice"]) == (0, 0, [])


def test_a_cut_log_is_reported_with_a_warning(tmp_path: Path) -> None:
    log = write(tmp_path / "log", CALLS)
    Path(log).write_bytes(Path(log).read_bytes()[:-20])
    ended = run_report(log, "--json")
    assert json.loads(ended.out)["calls"] == 2
    assert ended.err.startswith("asynctsqp.report: warning: ")
    assert len(ended.err.splitlines()) == 1


def test_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "damaged").write_text("{}\n{}\n")
    assert_error(process(str(tmp_path / "missing")), "missing", "No such file")
    assert_error(run_report(str(tmp_path)), "directory")
    assert_error(run_report(str(tmp_path / "empty")), "holds no calls")
    assert_error(run_report(str(tmp_path / "damaged")), "line 1")


@pytest.mark.parametrize("plot", ["plot", "plot.jpg", "plot.png.txt", ""])
def test_what_is_no_picture(log: str, plot: str) -> None:
    assert_error(run_report(log, "--plot", plot), "--plot", ".png")


def test_a_picture_that_cannot_be_written(log: str, tmp_path: Path) -> None:
    assert_error(run_report(log, "--plot", str(tmp_path / "no-such-directory" / "plot.png")), "cannot write the plot")


@pytest.mark.parametrize("flags", [(), ("log", "--nonsense"), ("log", "log")])
def test_wrong_arguments(flags: tuple[str, ...]) -> None:
    assert_error(run_report(*flags), "--help")


def test_without_matplotlib(log: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    ended = run_report(log, "--plot", str(tmp_path / "plot.png"))
    assert_error(ended, "pip install 'asynctsqp[plot]'")
    assert not (tmp_path / "plot.png").exists()


def test_a_reader_that_has_gone_is_no_error(log: str) -> None:
    command = [sys.executable, "-m", "asynctsqp.report", log]
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    reader.wait()
    with reader, subprocess.Popen(command, stdout=reader.stdin, stderr=subprocess.PIPE, cwd=ROOT) as report:
        _, err = report.communicate(timeout=60)
    assert (report.returncode, err) == (0, b"")


def test_a_full_standard_output_is_one_line(log: str) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "asynctsqp.report", log, "--json"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["asynctsqp.report: error: cannot write the report: No space left on device"]


def test_neither_torch_nor_a_side_is_loaded(log: str, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        f"sys.argv = ['report', {log!r}, '--plot', {str(tmp_path / 'plot.svg')!r}]\n"
        "from asynctsqp import report\n"
        "assert report.main() == 0\n"
        "print({'torch', 'transformers', 'zmq', 'tee_side', 'gpu_side'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.splitlines()[-1] == "set()", done.stderr
