"""benchmarks.sweep: what it asks of the engine and what it says. Its times are nobody's business here."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asynctsqp.checkpoint import Checkpoint
from benchmarks import sweep
from benchmarks.cli import engine_options
from benchmarks.figures import sign_interval
from benchmarks.sweep_settings import settings, unlike_automatic
from tests import models
from tests.test_benchmark_ladder import benchmark

LAYER_CALLS = 4 * models.BASE["num_hidden_layers"]
PROMPT_TOKENS = 300  # two chunks of 256, one of 512 or more
SETTINGS = ("chunk_tokens=256", "doorbell=off")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path]) -> dict[str, Any]:
    """A short run's, which is the same in its last line and in --out."""
    out = tmp_path_factory.mktemp("sweep") / "out.json"
    options = ["--model", str(tiny_model("gqa")), "--prompt-tokens", str(PROMPT_TOKENS), "--out", str(out)]
    options += [word for name in SETTINGS for word in ("--setting", name)]
    done = benchmark("sweep", *options, "--rounds", "1", "--pairs", "1", "--limit-s", "0")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found == json.loads(out.read_text())
    return found


def test_the_report_says_what_was_run(report: dict[str, Any]) -> None:
    assert report["benchmark"] == "sweep"
    assert report["aim"] == 1.05
    assert report["settings"].items() >= {"dtype": "float32", "prompt_tokens": PROMPT_TOKENS, "pairs": 1}.items()
    assert list(report["results"]) == ["decode", "prefill"]
    for result in report["results"].values():
        found = result["settings"]
        assert list(found) == ["automatic", *SETTINGS]
        assert [one["options"] for one in found.values()] == [{}, {"chunk_tokens": 256}, {"doorbell": "off"}]


def test_each_setting_reaches_its_engine_and_changes_no_token(report: dict[str, Any]) -> None:
    """A chunk is 4 calls a layer, 1 of the last layer; the last chunk and a decoded token make all, and scores."""
    prefill = {name: one["calls"] for name, one in report["results"]["prefill"]["settings"].items()}
    assert prefill == {
        "automatic": LAYER_CALLS + 1,
        "chunk_tokens=256": 2 * LAYER_CALLS + 1 - 3,
        "doorbell=off": LAYER_CALLS + 1,
    }
    for one in report["results"]["decode"]["settings"].values():
        assert one["calls"] == (sweep.STEPS + 1) * (LAYER_CALLS + 1)
    assert all(one["same_tokens"] for result in report["results"].values() for one in result["settings"].values())


def test_the_best_is_chosen_in_one_step_and_compared_in_another(report: dict[str, Any]) -> None:
    for result in report["results"].values():
        found, pairs = result["settings"], result["comparison"]
        medians = {name: statistics.median(found[name]["samples"]) for name in SETTINGS}
        assert result["best"] == min(medians, key=medians.__getitem__)
        assert found["automatic"]["ratio"] == 1
        assert len(pairs["samples"]) == 1
        assert pairs["samples"][0]["ours"] not in found["automatic"]["samples"]
        assert pairs["samples"][0]["theirs"] not in found[result["best"]]["samples"]
        assert pairs["ratio"] == pytest.approx(pairs["ours_median"] / pairs["theirs_median"])
        assert pairs["verdict"] in ("too few pairs", "disturbed")


def test_automatic_is_not_a_candidate() -> None:
    found = {"automatic": {"median": 1.0}, "lanes=1": {"median": 3.0}, "lanes=4": {"median": 2.0}}
    assert sweep.quickest(found) == "lanes=4"


@pytest.mark.parametrize(
    ("ratios", "disturbed", "words"),
    [
        ([0.95, 0.97, 0.99, 1.01, 1.03, 1.05], False, "reached"),  # six samples: the interval is all of them, 97 %
        ([0.95, 0.97, 0.99, 1.01, 1.03, 1.06], False, "cannot be told apart"),
        ([1.05, 1.2, 1.3, 1.3, 1.3, 1.4], False, "cannot be told apart"),
        ([1.06, 1.2, 1.3, 1.3, 1.3, 1.4], False, "missed"),
        ([1.04, *[1.2] * 8], False, "missed"),  # nine samples: the second to the eighth, 96 %
        ([1.5] * 5, False, "too few pairs"),  # 94 %
        ([1.5] * 6, True, "disturbed"),
    ],
)
def test_the_verdict_follows_the_interval(ratios: list[float], disturbed: bool, words: str) -> None:
    interval = vars(sign_interval(ratios))
    assert sweep.verdict({"interval": interval, "disturbed": disturbed}) == words


def test_every_setting_is_a_set_of_options() -> None:
    options = [engine_options(name.split()) for name in settings()]
    assert {len(one) for one in options} == {1, 2}
    assert {"lanes": 4, "chunk_tokens": 256} in options
    lone: dict[str, set[Any]] = {}
    for name, value in (item for one in options if len(one) == 1 for item in one.items()):
        lone.setdefault(name, set()).add(value)
    assert lone.keys() == {"lanes", "chunk_tokens", "doorbell", "threads"}
    assert (lone["lanes"], lone["doorbell"]) == ({1, 2, 4}, {"on", "off"})
    assert lone["chunk_tokens"] == {256, 512, 1024}


def test_settings_that_are_automatic_anyway_are_left_out(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two lanes and chunks of 1024 tokens are the defaults; threads and doorbell are the machine's matter."""
    checkpoint = Checkpoint.find(str(tiny_model("16-layers")))  # its context holds more than a chunk
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    left_out = {"lanes=2", "chunk_tokens=1024", "doorbell=on", "threads=2"}
    assert set(settings()) - set(unlike_automatic(checkpoint, "float32")) == left_out
    monkeypatch.setattr("platform.machine", lambda: "aarch64")  # no doorbell
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})  # one core is left to the other side
    left_out = {"lanes=2", "chunk_tokens=1024", "doorbell=off", "doorbell=on"}
    assert set(settings()) - set(unlike_automatic(checkpoint, "float32")) == left_out
    assert "threads=4" in settings()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--prompt-tokens", "500"), "--prompt-tokens is at most 495"),
        (("--rounds", "0"), "at least 1"),
        (("--pairs", "0"), "at least 1"),
        (("--model", "random:no-such"), "no random model"),
    ],
)
def test_bad_arguments_are_one_line(
    options: tuple[str, ...], words: str, tiny_model: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main(["--model", str(tiny_model("gqa")), *options]) == 2
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1
    assert words in printed
