"""CUDA devices are for the tests that ask for one: all others compute on the CPU, as on a machine without."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

PRESENT = torch.cuda.is_available()
needs_cuda = pytest.mark.skipif(not PRESENT, reason="torch sees no CUDA device here")
VARIABLE = "CUDA_VISIBLE_DEVICES"
_OWN = os.environ.get(VARIABLE)


def hide() -> None:
    """From processes that are started from here on; this one has looked, and looks no more."""
    if PRESENT:
        torch.cuda.init()
    os.environ[VARIABLE] = ""


@contextmanager
def shown() -> Iterator[None]:
    """To processes that are started meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        if _OWN is None:
            patch.delenv(VARIABLE, raising=False)
        else:
            patch.setenv(VARIABLE, _OWN)
        yield
