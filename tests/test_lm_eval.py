"""lm-evaluation-harness says the same of the split as of its own transformers backend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.evaluate import tasks
from tests.processes import ROOT

pytest.importorskip("lm_eval", reason="lm-eval is not installed")


def evaluated(backend: str, model: Path, directory: Path) -> dict[str, Any]:
    """By a process of its own: what the harness imports warns of itself, and sets things for the whole process."""
    directory.mkdir()
    command = [sys.executable, "-m", "tests.evaluate", backend, str(model), str(directory)]
    environment = os.environ | {"HF_HOME": str(directory)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout))


def test_the_harness_says_the_same_as_with_transformers(demo_model: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor() as both:
        ours, theirs = both.map(lambda backend: evaluated(backend, demo_model, tmp_path / backend), ("asynctsqp", "hf"))
    assert set(ours) == set(theirs) == {"choice", "rolling", "until"}

    def choices(found: dict[str, Any]) -> list[tuple[float, bool]]:
        return [(logprob, greedy) for sample in found["choice"]["said"] for [[logprob, greedy]] in sample]

    pairs = list(zip(choices(ours), choices(theirs), strict=True))
    difference = max(abs(our[0] - their[0]) for our, their in pairs)
    assert len(pairs) == 20
    assert difference < 1e-3
    assert [our[1] for our, _ in pairs] == [their[1] for _, their in pairs]
    assert {our[1] for our, _ in pairs} == {True, False}
    assert ours["choice"]["results"]["acc,none"] == theirs["choice"]["results"]["acc,none"] > 0

    rolling = [[sample[0][0] for sample in found["rolling"]["said"]] for found in (ours, theirs)]
    apart = max(abs(our - their) for our, their in zip(*rolling, strict=True))
    assert apart < 1e-3
    assert ours["until"]["said"] == theirs["until"]["said"]
    assert all(sample[0][0] for sample in ours["until"]["said"])
    print(
        f"log-likelihoods: {len(pairs)} of choices at most {difference:.1e} apart, {len(rolling[0])} of whole texts "
        f"{apart:.1e}; accuracy {ours['choice']['results']['acc,none']}"
    )


def commanded(model: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """`python -m asynctsqp.evaluation` on the first of the tasks; a task's YAML may be JSON."""
    (directory / "choice.yaml").write_text(json.dumps(tasks(directory)[0]))
    chosen = ["--tasks", "choice", "--include_path", str(directory)]
    command = [sys.executable, "-m", "asynctsqp.evaluation", "--model", "asynctsqp", "--model_args", f"model={model}"]
    environment = os.environ | {"HF_HOME": str(directory), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command + chosen, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


def test_the_command_prints_the_harness_s_table(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    done = commanded(str(tiny_model("gqa")), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "|choice|" in done.stdout


def test_a_model_that_is_not_there_is_told_in_one_line(tmp_path: Path) -> None:
    done = commanded(str(tmp_path / "nothing"), tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("asynctsqp.evaluation: error: there is no model directory")


def test_without_the_harness_the_command_says_what_to_install() -> None:
    code = "import sys; sys.modules['lm_eval'] = None; from asynctsqp.evaluation import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "asynctsqp.evaluation: error: lm_eval is not installed: pip install 'asynctsqp[eval]'\n"
