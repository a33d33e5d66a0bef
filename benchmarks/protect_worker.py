"""The contender that is this project with --protect: as benchmarks.split_worker, with masks and a mask peer."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.split_worker import Split
from benchmarks.worker import serve

END_S = 10.0


class Protected(Split):
    """One engine, its GPU side, and a mask peer if one is asked for: all of them in this process's tree."""

    def __init__(self, runner: asyncio.Runner) -> None:
        super().__init__(runner)
        self._peer: subprocess.Popen[str] | None = None

    def load(self, model: str, dtype: str, options: dict[str, Any], peer: bool = False) -> dict[str, Any]:
        return super().load(model, dtype, options | (self._start_peer(model) if peer else {}))

    def prepare(self, tokens: int) -> dict[str, Any]:
        """Masks for so many tokens, or for as many as fit."""
        start = time.perf_counter()
        made = self._runner.run(self._loaded().prepare_masks(tokens))
        return {"tokens": made, "seconds": time.perf_counter() - start}

    def close(self) -> None:
        super().close()
        if self._peer is not None:
            self._peer.terminate()
            self._peer.wait(END_S)

    def _start_peer(self, model: str) -> dict[str, Any]:
        """On this machine, so it hides nothing: what is measured is what it costs."""
        with tempfile.TemporaryDirectory() as directory:
            secret = str(Path(directory) / "secret")
            command = [sys.executable, "-m", "asynctsqp.gpu", "--model", model, "--bind", "tcp://127.0.0.1:0"]
            self._peer = subprocess.Popen(
                [*command, "--mask-peer-secret", secret], stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
            )
            said = {}
            for _ in range(2):
                word, _, value = self._peer.stdout.readline().strip().partition(" ") if self._peer.stdout else ("",) * 3
                said[word] = value
        if set(said) != {"listening", "mask-peer-key"}:
            raise RuntimeError(f"the mask peer did not start: it said {sorted(said)}")
        return {"mask_peer": said["listening"], "mask_peer_key": said["mask-peer-key"]}


def main() -> None:
    with asyncio.Runner() as runner:
        contender = Protected(runner)
        commands = {"load": contender.load, "answer": contender.answer, "together": contender.together}
        try:
            serve(commands | {"prepare": contender.prepare})
        finally:
            contender.close()


if __name__ == "__main__":
    main()
