"""Whatever ends a command is one line and an exit code."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from asynctsqp.ending import ended
from asynctsqp.errors import BadInputError, IntegrityError
from tests.processes import ROOT

PROGRAM = "from asynctsqp.ending import ended; import sys; sys.exit(ended('p', lambda: print('x' * 9), 'cannot write'))"

LATE = """
import sys
from asynctsqp.ending import ended

def work():
    raise TimeoutError("too slow")

sys.exit(ended("p", work, "cannot write"))
"""


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (BadInputError("no such thing"), 2, "p: error: no such thing"),
        (IntegrityError("a lie"), 4, "p: error: a lie"),
        (KeyboardInterrupt(), 130, "p: interrupted"),
        (asyncio.CancelledError(), 130, "p: interrupted"),
    ],
)
def test_what_ends_it(error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise error

    assert ended("p", work, "cannot write") == code
    assert capsys.readouterr().err.splitlines() == [line]


def test_done_is_zero_and_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended("p", lambda: None, "cannot write") == 0
    assert capsys.readouterr().err == ""


def test_a_reader_that_has_gone_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], stdout=writer, stderr=subprocess.PIPE, cwd=ROOT, timeout=60
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_full_disk_is_one_line() -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], stdout=full, stderr=subprocess.PIPE, cwd=ROOT, timeout=60
        )
    assert (done.returncode, done.stderr) == (2, b"p: error: cannot write: No space left on device\n")


def test_what_the_system_says_in_other_words_is_one_line_too() -> None:
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stderr) == (2, b"p: error: cannot write: too slow\n")
