"""Pads of a peer: right, each used once, asked for ahead of need and within the memory that was given."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asynctsqp.errors import CallRefused, GpuSideLost
from asynctsqp.integer_weights import Matrix
from asynctsqp.key_stream import KeyStream, row_words
from asynctsqp.mask_blocks import most_rows
from asynctsqp.model_spec import Op
from gpu_side.router import MAX_CALLS
from tee_side import peer_pads
from tee_side.masking import Pad
from tee_side.peer_pads import RUNNING_ROWS, Budget, PeerPads
from tee_side.stock import Batch

SHAPES: dict[Matrix, tuple[int, int]] = {
    (Op.QKV, 0): (24, 16),
    (Op.DOWN, 0): (16, 30),
    (Op.LM_HEAD, 0): (50, 16),
    (Op.QKV, 1): (24, 16),
    (Op.DOWN, 1): (16, 30),
}
ROW_BYTES = sum(4 * n for n, _ in SHAPES.values())
MATRICES = [*SHAPES]


class Peer:
    """Right products, given when `answering` is set; keeps what it was asked for."""

    failure = None  # its connection is never lost

    def __init__(self) -> None:
        generator = np.random.default_rng(1)
        self._weights = {matrix: generator.integers(-127, 128, shape) for matrix, shape in SHAPES.items()}
        self._stream = KeyStream()
        self.answering = asyncio.Event()
        self.answering.set()
        self.asked: list[tuple[Matrix, int]] = []
        self.error: Exception | None = None

    def product(self, matrix: Matrix, words: np.ndarray) -> np.ndarray:
        exact = words.astype(np.int64) @ self._weights[matrix].T
        return ((exact + 2**31) % 2**32 - 2**31).astype(np.int32)

    async def ask(self, matrix: Matrix, rows: int) -> Batch:
        self.asked.append((matrix, rows))
        width = SHAPES[matrix][1]
        address = self._stream.take(rows * row_words(width))
        await self.answering.wait()
        if self.error is not None:
            raise self.error
        words = self._stream.words(address, (rows, row_words(width)))[:, :width]
        product = self.product(matrix, words)
        product.flags.writeable = False  # as a message's memory may be
        return Batch(self._stream, address, product)

    def use(self, matrix: Matrix, rows: int, pad: Pad) -> list[bytes]:
        """That the pad hides and reveals what it should -> its rows of r."""
        mask = np.empty((rows, SHAPES[matrix][1]), dtype=np.int32)
        pad.mask(np.zeros(mask.shape), mask)
        assert (pad.unmask(self.product(matrix, mask)) == 0).all()
        return [row.tobytes() for row in mask]

    def close(self) -> None:
        pass


def budget(tokens: int) -> Budget:
    """For so many in stock."""
    return Budget(4 * tokens * ROW_BYTES // 3, ROW_BYTES, tokens)


def with_pads(tokens: int, work: Callable[[PeerPads, Peer], Coroutine[Any, Any, None]]) -> Peer:
    async def run() -> Peer:
        peer = Peer()
        pads = PeerPads(peer, SHAPES, budget(tokens))  # type: ignore[arg-type]
        try:
            async with asyncio.timeout(20):
                await work(pads, peer)
        finally:
            await pads.close()
        return peer

    return asyncio.run(run())


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


Event = tuple[Matrix, int, bool]
EVENTS = st.tuples(st.sampled_from(MATRICES), st.integers(1, 60), st.booleans())


@settings(max_examples=60, deadline=None)
@given(st.lists(EVENTS, max_size=40), st.integers(4, 80))
def test_any_order_of_taking_and_leaving(events: list[Event], tokens: int) -> None:
    """All at once, some cancelled: every pad is right, and no row of any mask is seen twice."""
    seen: list[bytes] = []

    async def work(pads: PeerPads, peer: Peer) -> None:
        async def one(matrix: Matrix, rows: int) -> None:
            seen.extend(peer.use(matrix, rows, await pads.take(matrix, rows)))

        tasks = [asyncio.create_task(one(matrix, rows)) for matrix, rows, _ in events]
        await asyncio.sleep(0)
        for task, (_, _, leaves) in zip(tasks, events, strict=True):
            if leaves:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task, (_, _, leaves) in zip(tasks, events, strict=True):
            assert leaves or task.exception() is None
        for matrix in MATRICES:
            seen.extend(peer.use(matrix, 3, await pads.take(matrix, 3)))

    with_pads(tokens, work)
    assert len(set(seen)) == len(seen)


def test_the_stock_fills_up_to_its_memory_and_no_further() -> None:
    async def work(pads: PeerPads, peer: Peer) -> None:
        assert await pads.prepare(1000) == 100
        assert pads.nbytes == 100 * ROW_BYTES
        asked = len(peer.asked)
        await settle()
        assert len(peer.asked) == asked

    with_pads(100, work)


def test_a_stock_that_is_used_is_filled_again_while_requests_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces that are worth a question, not a row at a time."""
    monkeypatch.setattr(peer_pads, "cores_to_spare", lambda: True)

    async def work(pads: PeerPads, peer: Peer) -> None:
        await pads.prepare(400)
        peer.asked.clear()
        with pads.working():
            for _ in range(1000):
                for matrix in MATRICES:
                    peer.use(matrix, 1, await pads.take(matrix, 1))
                await settle()
            assert len(peer.asked) < len(MATRICES) * 1000 / 50
            assert all(rows == 100 for _, rows in peer.asked)
            assert pads.rows >= 200

    with_pads(400, work)


def test_on_few_cores_a_running_request_has_a_few_steps_ahead_and_the_rest_comes_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peer_pads, "cores_to_spare", lambda: False)

    async def work(pads: PeerPads, peer: Peer) -> None:
        await pads.prepare(400)
        peer.asked.clear()
        with pads.working():
            for matrix in MATRICES:
                peer.use(matrix, 300, await pads.take(matrix, 300))
            await settle()
            assert not peer.asked, "there is enough for a decode step"
            for _ in range(200):
                for matrix in MATRICES:
                    peer.use(matrix, 1, await pads.take(matrix, 1))
                await settle()
            assert RUNNING_ROWS - 1 <= pads.rows < 3 * RUNNING_ROWS
            assert all(rows >= RUNNING_ROWS // 2 for _, rows in peer.asked)
        await settle()
        assert pads.rows >= 200, "nobody had to come for it"

    with_pads(400, work)


def test_what_a_call_waits_for_comes_first_then_the_next_layers() -> None:
    async def work(pads: PeerPads, peer: Peer) -> None:
        await settle()
        peer.asked.clear()
        taking = asyncio.create_task(pads.take((Op.QKV, 0), 500))
        await settle()
        assert peer.asked[0] == ((Op.QKV, 0), 500 - 16), "less what is on its way"
        assert [matrix for matrix, _ in peer.asked[1:4]] == [(Op.DOWN, 0), (Op.QKV, 1), (Op.DOWN, 1)]
        assert all(rows == 500 - 16 for _, rows in peer.asked[1:4])
        assert (Op.LM_HEAD, 0) not in {matrix for matrix, rows in peer.asked if rows > 16}
        peer.answering.set()
        peer.use((Op.QKV, 0), 500, await taking)

    async def run() -> None:
        peer = Peer()
        peer.answering.clear()
        big = Budget(4000 * ROW_BYTES, ROW_BYTES, 16)
        pads = PeerPads(peer, SHAPES, big)  # type: ignore[arg-type]
        try:
            async with asyncio.timeout(20):
                await work(pads, peer)
        finally:
            await pads.close()

    asyncio.run(run())


def test_questions_in_flight_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_pads, "IN_FLIGHT_BYTES", 4000)

    async def work(pads: PeerPads, peer: Peer) -> None:
        peer.answering.clear()
        tasks = [asyncio.create_task(pads.take(matrix, 100)) for matrix in MATRICES]
        await settle()
        assert sum(rows * 4 * SHAPES[matrix][0] for matrix, rows in peer.asked) < 4000 + 100 * 4 * 50
        peer.answering.set()
        await asyncio.gather(*tasks)

    with_pads(40, work)


def test_a_peer_is_not_asked_more_at_once_than_it_takes() -> None:
    """Narrow matrices and much room: 16 MiB of answers would be more questions than a peer has places for."""

    async def work(pads: PeerPads, peer: Peer) -> None:
        peer.answering.clear()
        await settle()
        assert MAX_CALLS // 4 < len(peer.asked) <= MAX_CALLS // 2
        peer.answering.set()
        assert await pads.prepare(50_000) >= 50_000

    with_pads(200_000, work)


def test_a_question_is_no_larger_than_both_sides_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asynctsqp.mask_blocks.MASK_BLOCK_BYTES", 1000)

    async def work(pads: PeerPads, peer: Peer) -> None:
        peer.use((Op.LM_HEAD, 0), 77, await pads.take((Op.LM_HEAD, 0), 77))
        await pads.prepare(20)
        assert all(rows <= most_rows(*SHAPES[matrix]) for matrix, rows in peer.asked)
        assert max(rows for _, rows in peer.asked) > 4

    with_pads(40, work)


def test_what_the_peer_fails_with_reaches_all_who_wait_and_the_next_may_try_again() -> None:
    async def work(pads: PeerPads, peer: Peer) -> None:
        peer.answering.clear()
        peer.error = GpuSideLost("it is gone")
        tasks = [asyncio.create_task(pads.take(matrix, 50)) for matrix in MATRICES for _ in range(2)]
        await settle()
        peer.answering.set()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(outcome, GpuSideLost) for outcome in outcomes)
        asked = len(peer.asked)
        await settle()
        assert len(peer.asked) == asked, "nobody is asked until somebody comes"
        assert await pads.prepare(0) == 0, "how many there are can be asked all the same"
        with pytest.raises(GpuSideLost):
            await pads.prepare(10)
        peer.error = None
        peer.use(MATRICES[0], 50, await pads.take(MATRICES[0], 50))
        assert await pads.prepare(10) >= 10

    with_pads(40, work)


@pytest.mark.parametrize("error", [CallRefused("no"), OSError("no memory")])
def test_a_failure_of_another_kind_is_told_too(error: Exception) -> None:
    async def work(pads: PeerPads, peer: Peer) -> None:
        peer.error = error
        with pytest.raises((CallRefused, GpuSideLost), match="no"):
            await pads.take(MATRICES[0], 50)

    with_pads(40, work)


def test_progress_is_told_up_to_the_end() -> None:
    told: list[tuple[str, int, int]] = []

    async def work(pads: PeerPads, peer: Peer) -> None:
        await pads.prepare(30, lambda *words: told.append(words))

    with_pads(40, work)
    assert told
    assert all(doing == "receiving masks" and 0 <= done <= total for doing, done, total in told)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


def test_a_long_pad_is_not_put_together() -> None:
    """Its products are subtracted where they are: the only copy of a message's memory is the answer itself."""

    async def work(pads: PeerPads, peer: Peer) -> None:
        pad = await pads.take((Op.QKV, 0), 700)
        assert pad._products is not None
        assert sum(map(len, pad._products)) == 700
        assert all(product.base is not None or not product.flags.writeable for product in pad._products)
        peer.use((Op.QKV, 0), 700, pad)

    with_pads(40, work)


def test_words_of_several_batches_are_those_of_each() -> None:
    """Rows of 30 words take 32 of the stream."""

    async def work(pads: PeerPads, peer: Peer) -> None:
        await pads.prepare(40)
        for rows in (1, 17, 5, 40, 3):
            peer.use((Op.DOWN, 1), rows, await pads.take((Op.DOWN, 1), rows))

    with_pads(40, work)
