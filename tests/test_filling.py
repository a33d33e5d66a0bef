"""What is shown while weights are read and the first masks are made."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from asynctsqp import filling_line
from tests.conftest import ROOT, GpuProcess
from tests.processes import run_tee


def test_a_terminal_sees_it_and_standard_output_does_not(
    tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path]
) -> None:
    ours, theirs = pty.openpty()
    shown = bytearray()

    def read() -> None:
        try:
            while data := os.read(ours, 4096):
                shown.extend(data)
        except OSError:  # the other end was closed
            pass

    command = [sys.executable, "-m", "asynctsqp.tee", "--model", str(tiny_model("gqa")), "--gpu", tiny_gpu.endpoint]
    command += ["--protect", "full", "--prompt", "Hello", "--max-new-tokens", "2", "--json"]
    reader = threading.Thread(target=read)
    reader.start()
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, stdin=subprocess.DEVNULL, cwd=ROOT)
    os.close(theirs)
    reader.join()
    os.close(ours)
    assert ended.returncode == 0, shown
    assert json.loads(ended.stdout)["completion_tokens"] == 2
    assert b"reading weights" in shown
    assert b"making masks" in shown
    assert b"\x1b[?25h" in shown, "the cursor is there again"


@pytest.mark.parametrize(("patience_s", "lines"), [(1000.0, 0), (-1.0, 1)])
def test_elsewhere_it_is_one_line_at_most(
    patience_s: float,
    lines: int,
    tiny_gpu: GpuProcess,
    tiny_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(filling_line, "PATIENCE_S", patience_s)
    flags = ("--model", str(tiny_model("gqa")), "--gpu", tiny_gpu.endpoint, "--protect", "full", "--json")
    ended = run_tee(*flags, "--prompt", "Hello", "--max-new-tokens", "2")
    assert ended.code == 0
    assert [line.startswith("asynctsqp.tee: still reading weights: ") for line in ended.errors] == [True] * lines
    assert json.loads(ended.out)["completion_tokens"] == 2
