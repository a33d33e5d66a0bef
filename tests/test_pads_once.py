"""No pad hides two things: no block of the key stream is ever sent twice, whatever calls are cancelled or made again.

Each test has its twin, or counts what it must have seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from asynctsqp import Engine
from asynctsqp.checkpoint import Checkpoint
from asynctsqp.config import EngineOptions
from asynctsqp.errors import GpuSideLost
from asynctsqp.integer_weights import matrices
from asynctsqp.key_stream import KeyStream
from asynctsqp.model_spec import Op
from tee_side.masking import Doubles, Pad
from tee_side.pipeline import Pipeline
from tee_side.shield import Shield, sealer_for
from tests.meddling_gpu import MeddlingGpu, leave_alone

BLOCK_BYTES = 16  # of AES: whatever is made twice of the key stream repeats at least one of these


def blocks_of(rows: np.ndarray) -> np.ndarray:
    """[n, K] words -> the whole AES blocks of each row, as bytes of one item each; K is a multiple of four."""
    return np.ascontiguousarray(rows).view(np.dtype((np.void, BLOCK_BYTES))).ravel()


def pads_seen(model: Path, calls: int) -> np.ndarray:
    """All blocks of calls by tasks that are cancelled, answered, left without an answer, and made again.

    The activations are zeros, so that what is sent is the pad itself.
    """
    checkpoint = Checkpoint(model)
    wanted = [matrix for matrix in matrices(checkpoint.spec) if matrix[0] is not Op.LM_HEAD]
    sent = list[np.ndarray]()
    faults = random.Random(7)

    async def call(shield: Shield) -> None:
        op, layer = faults.choice(wanted)
        linear = checkpoint.spec.linears[op]
        rows = faults.choice((1, 1, 1, 2, 5))
        x, out = np.zeros((rows, linear.in_features), np.float32), np.empty((rows, linear.out_features), np.float32)
        for _ in range(faults.choice((1, 1, 2, 3))):  # made again after a lost connection
            block = await shield.seal(op, layer, (x,), (out,))
            sent.append(np.array(block.inputs[0]))
            block.sent()
            if faults.random() < 0.3:
                await asyncio.sleep(0)

    async def work() -> None:
        options = EngineOptions(protect="full", mask_memory=8 << 20)
        shield = await sealer_for(checkpoint, options, threads=1)
        assert isinstance(shield, Shield)
        while len(sent) < calls:
            with shield.working() if faults.random() < 0.5 else contextlib.nullcontext():
                tasks = [asyncio.create_task(call(shield)) for _ in range(64)]
                await asyncio.sleep(0)
                for task in faults.sample(tasks, 16):
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        await shield.close()

    asyncio.run(work())
    return np.concatenate([blocks_of(rows) for rows in sent])


def test_no_pad_is_ever_seen_twice(tiny_model: Callable[[str], Path]) -> None:
    """In a hundred thousand calls no block of the key stream comes again."""
    blocks = pads_seen(tiny_model("gqa"), 10**5)
    assert len(blocks) > 10**5 * 64 // 4
    assert len(np.unique(blocks)) == len(blocks)


def overlapping(stream: KeyStream, words: int) -> int:
    """A key stream whose ranges are one block too short."""
    start = stream._next
    stream._next = start + words // 4 - 1
    return start


def test_pads_that_overlap_are_seen(tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: one block of the key stream that is in two pads."""
    monkeypatch.setattr(KeyStream, "take", overlapping)
    blocks = pads_seen(tiny_model("gqa"), 500)
    assert len(np.unique(blocks)) < len(blocks)


def test_no_pad_is_used_twice_when_connections_are_lost(
    meddling: MeddlingGpu, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real engine with requests at once, requests that leave, and a connection that breaks again and again."""
    used, masks = list[np.ndarray](), Pad.mask

    def mask(pad: Pad, x: Doubles, out: np.ndarray) -> None:
        assert pad._mask is not None
        used.append(pad._mask.copy())
        masks(pad, x, out)

    monkeypatch.setattr(Pad, "mask", mask)
    meddling.meddle = leave_alone
    prompt, chance = [1, *range(100, 130)], random.Random(2)
    losses, came = 0, asyncio.Event()

    async def answer(engine: Engine, leave_after: int) -> list[int]:
        found = list[int]()
        async with contextlib.aclosing(
            engine.generate(prompt, max_new_tokens=24, temperature=0, ignore_eos=True)
        ) as stream:
            async for piece in stream:
                found += [piece.token_id]
                came.set()
                if len(found) == leave_after:
                    break
        return found

    async def break_off(pipeline: Pipeline) -> None:
        pipeline._link.session.connection._fail(GpuSideLost("a fault that the test injects"))

    async def lose(engine: Engine) -> None:
        """As when the other side is gone: the link makes a new connection, and what was on its way is made again.

        Only after a new token: a call that is lost five times over is given up, and rightly.
        """
        nonlocal losses
        while True:
            came.clear()
            await came.wait()
            await asyncio.sleep(0.1 * chance.random())
            thread, pipeline = engine._running()
            await thread.run(break_off(pipeline))
            losses += 1

    async def work() -> None:
        options = {"protect": "full", "lanes": 2, "chunk_tokens": 8, "reconnect_s": 30}
        async with Engine.connect(tiny_model("gqa"), meddling.endpoint, **options) as engine:
            expected = await answer(engine, 24)
            breaking = asyncio.create_task(lose(engine))
            for _ in range(6):
                found = await asyncio.gather(*(answer(engine, chance.choice((1, 3, 24))) for _ in range(4)))
                assert all(tokens == expected[: len(tokens)] for tokens in found)
            breaking.cancel()
            await asyncio.gather(breaking, return_exceptions=True)

    asyncio.run(work())
    assert losses > 10
    assert len(used) > 1500
    blocks = np.concatenate([blocks_of(rows) for rows in used])
    assert len(np.unique(blocks)) == len(blocks)
