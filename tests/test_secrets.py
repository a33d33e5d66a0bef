"""No secret of an answer is in what the GPU side can read: all messages, and the shared memory while it is used.

The twin shows the same search what other levels do send.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from asynctsqp import Engine, key_stream
from asynctsqp.checkpoint import Checkpoint
from tee_side import freivalds
from tee_side.masking import Doubles, Floats, Pad, Scale
from tee_side.shield import Shield
from tests.meddling_gpu import MeddlingGpu, leave_alone

MOST_REGIONS = 8


class Secrets:
    """What must not leave, as it lies in the enclave's memory: found out by looking over the code's shoulder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: dict[str, list[bytes]] = {}
        quantize, pad_made = Scale.quantize, Pad.__init__

        def watched_quantize(scale: Scale, x: Floats) -> tuple[Doubles, Doubles]:
            whole, column = quantize(scale, x)
            self.note("activations", x)
            self.note("integers", whole.astype(np.int32))
            self.note("scales", column)
            return whole, column

        def watched_pad(pad: Pad, mask: np.ndarray, *products: np.ndarray) -> None:
            self.note("r", mask)
            for product in products:
                self.note("u", product)
            pad_made(pad, mask, *products)

        def watched_bytes(size: int) -> bytes:
            made = secrets.token_bytes(size)
            self.found.setdefault("keys and S's bytes", []).append(made[:32])
            return made

        monkeypatch.setattr(Scale, "quantize", watched_quantize)
        monkeypatch.setattr(Pad, "__init__", watched_pad)
        for module in (key_stream, freivalds):  # not the shared region's name and nonce, which are no secrets
            monkeypatch.setattr(module, "secrets", SimpleNamespace(token_bytes=watched_bytes))

    def note(self, name: str, rows: np.ndarray) -> None:
        """Beginning and middle of the first row and of the last: at least eight bytes, which chance does not repeat."""
        for row in (rows[0], rows[-1]):
            raw = row.tobytes()
            middle = len(raw) // 2 // 8 * 8
            self.found.setdefault(name, []).extend({raw[:24], raw[middle : middle + 24]} - {b""})

    def seen_in(self, heard: bytes) -> set[str]:
        """The names of those that the other side has."""
        return {name for name, needles in self.found.items() if any(needle in heard for needle in needles)}


def heard_and_secret(
    gpu: MeddlingGpu, model: Path, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[bytes, Secrets]:
    """One answer: every byte that the other side could read, and every secret of the engine that gave it."""
    private = Secrets(monkeypatch)
    prompt = [1, *range(20_000, 20_012)]
    regions = list[bytes]()
    gpu.heard.clear()
    gpu.meddle = leave_alone
    start = gpu.calls

    def look(memory: memoryview) -> None:
        if (gpu.calls - start) % 7 == 0 and len(regions) < MOST_REGIONS:
            regions.append(bytes(memory))

    gpu.look_at_memory = look

    async def work() -> None:
        async with Engine.connect(model, gpu.endpoint, lanes=1, slot_bytes=204_800, **options) as engine:
            answer = (await engine.complete(prompt, max_new_tokens=3, temperature=0, ignore_eos=True)).token_ids
            scores = (await engine.logits([*prompt, *answer])).numpy()
            assert engine._pipeline is not None
            shield = engine._pipeline._sealer
        tokens = [*prompt, *answer]
        for dtype in (np.int32, np.int64):
            private.note("token ids", np.lib.stride_tricks.sliding_window_view(np.array(tokens, dtype), 4))
        private.note("logits", scores)
        embedding = Checkpoint(model).read("model.embed_tokens.weight").numpy()
        private.note("embeddings", embedding[tokens])
        if isinstance(shield, Shield):
            for guard in shield._guards.values():
                if guard.check is not None:
                    private.note("S", guard.check._secret[:2])
                    private.note("T", guard.check._expected[:2])

    asyncio.run(work())
    gpu.look_at_memory = None
    return b"\0".join([*gpu.heard, *regions]), private


@pytest.mark.parametrize("transport", ["binary", "msgpack", "shm"])
def test_no_secret_is_in_any_message(
    transport: str, meddling: MeddlingGpu, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every byte that was sent, or lay in shared memory, against every secret of the pass."""
    heard, private = heard_and_secret(meddling, tiny_model("gqa"), monkeypatch, protect="full", transport=transport)
    assert len(heard) > 10**5
    names = {"activations", "integers", "scales", "r", "u", "S", "T", "token ids", "logits", "embeddings"}
    assert set(private.found) == names | {"keys and S's bytes"}
    assert all(len(needle) >= 8 for needles in private.found.values() for needle in needles)
    assert private.seen_in(heard) == set()


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({"protect": "verify", "transport": "binary"}, {"integers"}),
        ({"protect": "verify", "transport": "shm"}, {"integers"}),
        ({"protect": "none", "partition": "per-op", "transport": "binary"}, {"token ids"}),
    ],
)
def test_secrets_that_are_sent_are_found(
    options: dict[str, Any],
    seen: set[str],
    meddling: MeddlingGpu,
    tiny_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The twin: the search sees what these levels show."""
    heard, private = heard_and_secret(meddling, tiny_model("gqa"), monkeypatch, **options)
    assert private.seen_in(heard) == seen
