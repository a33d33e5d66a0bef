"""A benchmark that is called wrongly."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from types import ModuleType

import pytest


def assert_refused(
    program: ModuleType,
    model: Path,
    options: Sequence[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    codes: Collection[int] = (2,),
) -> None:
    """In one line on standard error that has these words."""
    assert program.main(["--model", str(model), *options]) in codes
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1
    assert words in printed
