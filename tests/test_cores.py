"""How idle threads wait in a program that uses the Python API."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.processes import ROOT

IMPORT_AND_TELL = """
import os
before = dict(os.environ)
{first}
from asynctsqp import Engine
assert dict(os.environ) == before, "the environment was changed"
"""


def openmp_says(first: str, **environment: str) -> str:
    """Its own account."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    ended = subprocess.run(
        [sys.executable, "-c", IMPORT_AND_TELL.format(first=first)],
        env=clean | environment | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    if "GOMP_SPINCOUNT" not in ended.stderr:
        pytest.skip("torch's OpenMP here is not GNU's")
    return ended.stderr


def test_an_engine_is_imported_with_threads_that_soon_sleep() -> None:
    said = openmp_says("")
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in said
    assert "GOMP_SPINCOUNT = '1000'" in said


def test_a_user_of_the_api_has_the_last_word() -> None:
    assert "GOMP_SPINCOUNT = '77'" in openmp_says("", GOMP_SPINCOUNT="77")


def test_a_torch_that_was_there_before_stays_as_it_is() -> None:
    of_torch, *_ = openmp_says("import torch").split("ENVIRONMENT END")  # scikit-learn brings one of its own
    assert "GOMP_SPINCOUNT = '1000'" not in of_torch


PAUSE_AFTER_PRODUCTS = """
import time
{first}
import numpy as np
x = np.ones((700, 700))
for _ in range(3):
    x @ x
began = time.process_time()
time.sleep(0.05)
print(time.process_time() - began)
"""


def busy_s(first: str) -> float:
    """Processor time, by the operating system's account, of a process whose numpy has just computed, and that waits."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}
    command = [sys.executable, "-c", PAUSE_AFTER_PRODUCTS.format(first=first)]
    ended = subprocess.run(command, env=clean, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    return float(ended.stdout)


def test_numpys_idle_threads_soon_sleep_as_well() -> None:
    by_itself = busy_s("")
    if by_itself < 0.01:
        pytest.skip("numpy's threads sleep by themselves here, or there is one only")
    assert busy_s("from asynctsqp import Engine") < by_itself / 4
