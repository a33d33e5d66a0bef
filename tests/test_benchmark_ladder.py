"""benchmarks.ladder and benchmarks.caches: what they print and leave behind. Their times are nobody's business here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks import caches, ladder
from benchmarks.rungs import RUNGS
from tests.benchmark_refusals import assert_refused

LAYERS = 3
CALLS = {
    "per-op": 9 * LAYERS + 2,
    "seed": 6 * LAYERS + 2,
    "shielded": 4 * LAYERS + 1,
    "fused": 2 * LAYERS + 1,
    "fused-layer": LAYERS + 2,
}
PROMPT_TOKENS = 20


def benchmark(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.{name}", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path]) -> Path:
    """A directory with what a short run made: stdout, out.json, plot.svg. Random weights: transformers has the same."""
    folder = tmp_path_factory.mktemp("ladder")
    options = ["--model", f"random:{tiny_model('gqa')}", "--rounds", "1", "--limit-s", "0"]
    options += ["--prompt-tokens", str(PROMPT_TOKENS), "--out", str(folder / "out.json")]
    options += ["--plot", str(folder / "plot.svg"), *(word for rung in CALLS for word in ("--rung", rung))]
    done = benchmark("ladder", *options)
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def report(made: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((made / "out.json").read_text())
    return found


def test_the_last_line_is_the_json(made: Path, report: dict[str, Any]) -> None:
    assert json.loads((made / "stdout").read_text().splitlines()[-1]) == report
    assert report["benchmark"] == "ladder"
    assert report["settings"].items() >= {"prompt_tokens": PROMPT_TOKENS, "rounds": 1, "seconds": 0.0}.items()
    assert report["machine"]["cores"] > 0
    assert report["predecessor"]["prefill"]["calls"] == 182


def test_each_rung_takes_the_calls_of_its_partition(report: dict[str, Any]) -> None:
    results = report["results"]
    assert {name: result["prefill"]["calls"] for name, result in results.items()} == CALLS
    assert {name: result["decode"]["calls"] for name, result in results.items()} == CALLS
    sizes = [results[name]["prefill"]["bytes_sent"] for name in CALLS]
    assert sizes == sorted(sizes, reverse=True)


def test_each_rung_has_its_figures(report: dict[str, Any]) -> None:
    for result in report["results"].values():
        assert result["same_tokens"] is True
        for name in ("prefill", "decode"):
            figures = result[name]
            assert figures["bytes_sent"] > 0
            assert figures["bytes_received"] > 0
            assert 0 < figures["communication_share"] < 1
            assert figures["ratio"] == pytest.approx(figures["ours_median"] / figures["theirs_median"])
            assert len(figures["samples"]) == 1
    assert report["results"]["seed"]["prefill"]["speed_up"] == 1


def test_the_picture_and_the_readmes_table_come_from_the_result(
    made: Path, report: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "</svg>" in (made / "plot.svg").read_text()
    assert ladder.main(["--render", str(made / "out.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines] == ["rung", "---", *report["results"]]
    assert len({line.count("|") for line in lines}) == 1


def test_a_rung_differs_from_its_origin_by_one_thing() -> None:
    """Raw frames and shared memory are one: how tensors travel."""
    known: dict[str, tuple[str, ...]] = {}
    for rung in RUNGS:
        settings = rung.partition, rung.transport, rung.dtype, rung.doorbell
        if rung.origin is not None:
            origin = known[rung.origin]
            assert sum(one != other for one, other in zip(settings, origin, strict=True)) == 1, rung.name
        known[rung.name] = settings
    assert len(set(known.values())) == len(RUNGS) == len(known)


def test_what_is_kept_from_token_to_token_changes_none(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = ["--model", str(tiny_model("gqa")), "--context", "8", "--context", "24", "--steps", "3"]
    done = benchmark("caches", *options, "--rounds", "1", "--limit-s", "0", "--out", str(out))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == json.loads(out.read_text())
    assert [row["context"] for row in report["results"]] == [8, 24]
    for row in report["results"]:
        assert row["same_tokens"] is True
        assert row["speed_up"] == pytest.approx(row["again_ms"] / row["cached_ms"])
        assert len(row["samples"]) == 1


@pytest.mark.parametrize(
    ("program", "options", "words"),
    [
        (ladder, ("--prompt-tokens", "500"), "--prompt-tokens is at most 479"),
        (ladder, ("--rounds", "0"), "at least 1"),
        (ladder, ("--rung", "seed", "--dtype", "bfloat16"), "none of these rungs"),
        (caches, ("--context", "510"), "--context is at most 503"),
    ],
)
def test_bad_arguments_are_one_line(
    program: ModuleType,
    options: tuple[str, ...],
    words: str,
    tiny_model: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert_refused(program, tiny_model("gqa"), options, words, capsys)
