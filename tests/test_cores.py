"""How idle threads wait in a program that uses the Python API, by OpenMP's own account."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

IMPORT_AND_TELL = """
import os
before = dict(os.environ)
{first}
from asynctsqp import Engine
assert dict(os.environ) == before, "the environment was changed"
"""


def openmp_says(first: str, **environment: str) -> str:
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
    assert "GOMP_SPINCOUNT = '1000'" not in openmp_says("import torch")
