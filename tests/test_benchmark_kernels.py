"""benchmarks.kernels: that both ways of an operation give the same, and what is printed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import kernels


def test_both_ways_give_the_same() -> None:
    for numpys, torchs in kernels.pairs().values():
        np.testing.assert_allclose(np.ravel(numpys()), np.ravel(torchs()), rtol=1e-5, atol=1e-6)


def test_a_report_has_all_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main(["--calls", "2"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(report["results"]) == set(kernels.pairs())
    for row in report["results"].values():
        assert all(row[way][heat] > 0 for way in ("numpy", "torch") for heat in ("warm_us", "cold_us"))


def test_a_wrong_count_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main(["--calls", "0"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
