"""benchmarks.protect and quality: what they print. Their figures are nobody's business here, but for exact ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import protect, quality
from benchmarks.quality import Losses
from tests.benchmark_refusals import assert_refused
from tests.test_benchmark_ladder import benchmark
from tests.test_benchmark_pipeline import HIDDEN, INTERMEDIATE, LAYERS, QKV, VOCAB, verdict_of


def report_of(name: str, model: Path, *options: str) -> dict[str, Any]:
    out = model.parent / f"{name}.json"
    done = benchmark(name, "--model", str(model), *options, "--out", str(out))
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert report == json.loads(out.read_text())
    out.unlink()
    assert report["benchmark"] == name
    assert report["machine"]["cores"] > 0
    return report


def test_every_contender_is_measured(tiny_model: Callable[[str], Path]) -> None:
    report = report_of("protect", tiny_model("gqa"), "--quick", "--mask-memory", "40M")
    results = report["results"]
    names = {"none", "verify", "mask", "full", "full, peer", "int8 inside", "transformers"}
    for measure in ("decode", "prefill"):
        rows = results[measure]["contenders"]
        assert set(rows) == names
        assert rows["none"]["of_none"] == rows["transformers"]["of_transformers"] == rows["int8 inside"]["of_int8"] == 1
        for row in rows.values():
            assert row["of_none"] == pytest.approx(row["median"] / rows["none"]["median"])
        aim = results[measure]["aim"]
        if aim["contender"] in rows:
            reached = rows[aim["contender"]]["of_none"] <= aim["of_none"]
            assert results[measure]["verdict"] in verdict_of(reached)
        assert rows["none"]["masks"] is None
        assert rows["full"]["masks"] >= (20 if measure == "decode" else 48)
    assert results["bank"]["bytes_per_token"] == 4 * (LAYERS * (QKV + 2 * HIDDEN + 2 * INTERMEDIATE) + VOCAB)
    assert results["bank"]["tokens"] >= 8
    (rows,) = results["sustained"].values()
    assert set(rows) == names - {"verify", "mask"}
    assert {row["tokens"] for row in rows.values()} == {16}
    assert all(row["cpu_ms_per_token"] > 0 for row in rows.values())


def test_quality_of_a_model_that_loses_little(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The keeper of the lighthouse wrote down what he saw. " * 40)
    report = report_of("quality", tiny_model("gqa"), "--text", str(text), "--tokens", "60", "--window", "31")
    results = report["results"]
    assert results["predicted_tokens"] == 60
    assert list(results["levels"]) == ["float32", "full, 8 bits", "full, 12 bits"]
    exact, eight, twelve = results["levels"].values()
    assert (exact["ratio"], exact["error"], exact["divergence"], exact["agreement"]) == (1, 0, 0, 1)
    assert 0 < twelve["divergence"] < eight["divergence"] < 0.05
    for row, bits in ((eight, 8), (twelve, 12)):
        assert results["verdicts"][f"full, {bits} bits"] == (
            "reached" if row["ratio"] <= quality.AIMS[bits] else "missed"
        )
    assert report["settings"]["text"] == "text.txt"


def test_figures_of_two_distributions() -> None:
    """By hand: a half and a quarter against three eighths each, and the first token came."""
    exact = torch.tensor([[0.5, 0.25, 0.25]] * 2).log()
    other = torch.tensor([[0.25, 0.5, 0.25]] * 2).log()
    reference, losses = Losses(), Losses()
    reference.add(exact, exact, torch.tensor([0, 0]))
    losses.add(other, exact, torch.tensor([0, 0]))
    figures = losses.figures(reference)
    assert figures["perplexity"] == pytest.approx(4)
    assert figures["ratio"] == pytest.approx(2)
    assert figures["error"] == pytest.approx(0)
    assert figures["divergence"] == pytest.approx(0.25 * torch.log(torch.tensor(2.0)).item())
    assert figures["agreement"] == 0


@pytest.mark.parametrize(
    ("program", "options", "words"),
    [
        (protect, (), "the model's context is 512"),
        (protect, ("--rounds", "0"), "at least 1"),
        (protect, ("--engine", "protect=full"), "what is compared"),
        (quality, ("--window", "1"), "--window 2"),
        (quality, ("--window", "513"), "at most 512"),
        (quality, ("--window", "512", "--tokens", "100000000"), "a longer --text"),
        (quality, ("--window", "9", "--text", "/no/such/file"), "No such file"),
    ],
)
def test_bad_arguments_are_one_line(
    program: ModuleType,
    options: tuple[str, ...],
    words: str,
    tiny_model: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert_refused(program, tiny_model("gqa"), options, words, capsys, codes=(1, 2))
