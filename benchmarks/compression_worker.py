"""The TEE side of benchmarks.compression: engines that connect to a GPU side, driven by benchmarks.harness."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asynctsqp import Engine
from asynctsqp.checkpoint import Checkpoint
from asynctsqp.model_spec import Op
from asynctsqp.tensor_codec import WIRE_DTYPES
from benchmarks import compression_codecs
from benchmarks.compression_recorder import record
from benchmarks.worker import serve
from tee_side.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
TEXTS = ("docs/architecture.md", "README.md", "LICENSE")  # English; prose first

LINEARS = frozenset({Op.QKV, Op.O, Op.GATE_UP, Op.DOWN, Op.LM_HEAD})
ATTENTION = frozenset({Op.QK, Op.AV})


class TeeSide:
    """The commands that benchmarks.worker runs by name."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self._runner = runner
        self._engines: dict[str, Engine] = {}

    def tokens(self, model: str, count: int) -> dict[str, Any]:
        """The first `count` of the project's own texts."""
        text = "\n".join((ROOT / name).read_text() for name in TEXTS)
        tokenizer = Tokenizer(Path(model), Checkpoint.find(model).spec.vocab_size)
        tokens = tokenizer.encode(text)
        if len(tokens) < count:
            raise ValueError(f"the texts have {len(tokens)} tokens, {count} are wanted")
        return {"tokens": tokens[:count]}

    def activations(
        self, model: str, endpoint: str, dtype: str, tokens: Sequence[int], attention: bool
    ) -> dict[str, Any]:
        """Rows of compression_codecs, of the linears' payloads and, if wanted, of attention's products."""
        wanted = [("shielded", LINEARS), *([("batched", ATTENTION)] if attention else [])]
        rows = []
        for partition, ops in wanted:
            recording = self._runner.run(record(model, endpoint, dtype, partition, ops, tokens))
            rows += compression_codecs.measure(recording.payloads, WIRE_DTYPES[dtype].itemsize)
        return {"rows": rows, "prefill": compression_codecs.prefill(rows)}

    def connect(self, name: str, model: str, endpoint: str, options: dict[str, Any]) -> dict[str, Any]:
        """An engine that `prefill` knows by its name."""
        engine = Engine.connect(model, endpoint, transport="binary", **options)
        self._runner.run(engine.__aenter__())
        self._engines[name] = engine
        return {}

    def prefill(self, name: str, tokens: list[int]) -> dict[str, Any]:
        """To the first token."""
        start = time.perf_counter()
        self._runner.run(self._engines[name].complete(tokens, max_new_tokens=1, temperature=0.0, ignore_eos=True))
        return {"first_s": time.perf_counter() - start}

    def disconnect(self) -> dict[str, Any]:
        """All engines."""
        while self._engines:
            _, engine = self._engines.popitem()
            self._runner.run(engine.__aexit__(None, None, None))
        return {}


def main() -> None:
    with asyncio.Runner() as runner:
        tee = TeeSide(runner)
        commands = (tee.tokens, tee.activations, tee.connect, tee.prefill, tee.disconnect)
        try:
            serve({command.__name__: command for command in commands})
        finally:
            tee.disconnect()


if __name__ == "__main__":
    main()
