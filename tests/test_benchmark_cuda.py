"""benchmarks.cuda: what it refuses, and what it makes of two contenders on the CPU. No time is any of its business."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import cuda, machine
from benchmarks.communication import gpu_share
from benchmarks.cuda import Run, Setting
from benchmarks.cuda_table import show
from benchmarks.turns import Limits
from tests import devices


def test_without_a_device_it_ends_with_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.cuda", "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "benchmarks.cuda: error: torch sees no CUDA device here: there is nothing to measure\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--rounds", "0"), "at least 1"),
        (("--prompt-tokens", "0"), "at least 1"),
        (("--lanes", "2", "--lanes", "0"), "at least 1"),
        (("--lanes", "65"), "--lanes is at most 64"),
        (("--model", "random:llama-3.2-1b", "--prompt-tokens", "200000"), "--prompt-tokens is at most"),
        (("--model", "random:no-such"), "no-such"),
    ],
)
def test_bad_arguments_are_one_line(options: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cuda.main(options) == 2
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1
    assert words in printed


@pytest.mark.parametrize("option", ["--partition", "--dtype"])
def test_unknown_names_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cuda.main([option, "no-such"])
    assert end.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def settings(*words: str) -> list[Setting]:
    return cuda._settings(cuda._parser().parse_args(words))


def test_every_combination_is_a_setting() -> None:
    assert settings() == [
        Setting(model, "bfloat16", partition, None)
        for model in ("random:llama-3.2-1b", "random:llama-3.1-8b")
        for partition in ("shielded", "fused-layer")
    ]
    given = ["--model", "random:llama-3.2-1b", "--partition", "fused", "--partition", "shielded"]
    given += ["--lanes", "1", "--lanes", "2", "--dtype", "float16", "--dtype", "bfloat16", "--lanes", "1"]
    found = settings(*given)
    assert len(found) == len(set(found)) == 8
    # one transformers for a model and dtype
    assert len(list(itertools.groupby(found, lambda setting: (setting.model, setting.dtype)))) == 2


def test_the_aims_are_the_1b_shape_s_own() -> None:
    aims = {
        (setting.model, setting.partition): cuda.AIMS.get((setting.model, setting.partition)) for setting in settings()
    }
    assert aims[("random:llama-3.2-1b", "shielded")] == {"decode": 3.0, "prefill": 0.15}
    assert aims[("random:llama-3.2-1b", "fused-layer")] == {"decode": 1.5, "prefill": 0.15}
    assert [aim for (model, _), aim in aims.items() if "8b" in model] == [None, None]


def test_an_aim_stands_only_beside_what_it_was_set_for() -> None:
    setting = cuda.Setting("random:llama-3.2-1b", cuda.DTYPE, "shielded", None)
    prefill = cuda.Run(cuda.PROMPT_TOKENS, Limits(1, 1), "cpu").measures[1]
    assert cuda._aim(setting, prefill) == 0.15
    assert cuda._aim(dataclasses.replace(setting, dtype="float32"), prefill) is None
    assert cuda._aim(setting, cuda.Run(128, Limits(1, 1), "cpu").measures[1]) is None


def test_the_gpu_s_share_is_its_own_computing() -> None:
    answer = {
        "first_s": 2.0,
        "rest_s": 4.0,
        "computed": {"first_s": 1.0, "rest_s": 3.0, "gpu_first_s": 0.5, "gpu_rest_s": 5.0},
    }
    assert gpu_share(answer, "first_s") == 0.25
    assert gpu_share(answer, "rest_s") == 1


@pytest.fixture(scope="module")
def results(tiny_model: Callable[[str], Path]) -> list[dict[str, Any]]:
    """Of two settings, all of it on the CPU but where a CUDA device is."""
    model = f"random:{tiny_model('gqa')}"
    run = Run(20, Limits(1, 0.0), "cuda:0" if devices.PRESENT else "cpu")
    chosen = [Setting(model, "float32", "shielded", 1), Setting(model, "float32", "fused-layer", 1)]
    done: list[str] = []
    with devices.shown():
        found = list(cuda.measured(run, chosen, done.append))
    assert sum("loading" in step for step in done) == 2
    assert sum(step.startswith("transformers") for step in done) == 1
    return found


def test_a_setting_has_its_figures(results: list[dict[str, Any]]) -> None:
    assert [result["partition"] for result in results] == ["shielded", "fused-layer"]
    for result in results:
        assert result["same_tokens"] is True
        for name in ("decode", "prefill"):
            figures = result[name]
            assert 0 < figures["gpu_share"] <= 1
            assert 0 < figures["communication_share"] < 1
            assert figures["aim"] is None
            assert figures["ratio"] == pytest.approx(figures["ours_median"] / figures["theirs_median"])
    assert json.loads(json.dumps(results)) == results


def test_the_table_shows_each_beside_its_aim(results: list[dict[str, Any]]) -> None:
    aimed = json.loads(json.dumps(results))
    aimed[0]["decode"]["aim"] = 7.25
    report = {"machine": machine.describe() | {"gpu": "A device"}, "settings": {"prompt_tokens": 20}, "results": aimed}
    printed = io.StringIO()
    show(report, Console(file=printed, width=300))
    lines = printed.getvalue().splitlines()
    assert "on A device" in lines
    assert sum(" shielded " in line for line in lines) == sum(" fused-layer " in line for line in lines) == 2
    assert sum("7.25" in line for line in lines) == 1
    for result in results:
        for name, digits in (("decode", 2), ("prefill", 3)):
            assert f"{result[name]['ours_median']:.{digits}f}" in printed.getvalue()
            assert f"{result[name]['theirs_median']:.{digits}f}" in printed.getvalue()
