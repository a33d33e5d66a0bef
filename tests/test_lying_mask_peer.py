"""A mask peer that lies: every product of it that differs from the true one is caught, and nothing is released.

A wrong u makes y = y' - u wrong by the same words, so the check of y is the check of u. That one passes is a matter of
2^-56 (tee_side/freivalds).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import asynctsqp
from asynctsqp import Engine
from asynctsqp.integer_weights import Matrix
from asynctsqp.key_stream import KeyStream, row_words
from asynctsqp.messages import MaskCall
from asynctsqp.model_spec import Op
from asynctsqp.quantize import Quantized
from asynctsqp.ring import Ring, RingWeight
from tee_side.guard import Guard
from tee_side.masking import Pad
from tee_side.peer_pads import Budget, PeerPads
from tee_side.shield import CAUGHT_EITHER, Shield
from tee_side.stock import Batch
from tests.conftest import GpuProcess
from tests.mask_peers import MaskPeerThread, TrueProducts, mask_peer_thread
from tests.processes import assert_one_error, run_tee

CPU = torch.device("cpu")
LIES_OF_EACH_KIND = 1200
ROWS = 3
PROMPT = [1, *range(100, 140)]
# alike in shape, so that one's answer could pass for the other's
SHAPES: dict[Matrix, tuple[int, int]] = {(Op.QKV, 0): (96, 64), (Op.QKV, 1): (96, 64)}
MATRIX: Matrix = (Op.QKV, 1)
Words = np.ndarray


def flip_a_bit(u: Words, chance: np.random.Generator) -> None:
    u[tuple(chance.integers(u.shape))] ^= np.int32(1) << np.int32(chance.integers(31))


def change_a_word(u: Words, chance: np.random.Generator) -> None:
    u[tuple(chance.integers(u.shape))] ^= np.int32(chance.integers(1, 2**31))


def change_a_row(u: Words, chance: np.random.Generator) -> None:
    u[chance.integers(len(u))] = chance.integers(-(2**31), 2**31, u.shape[1])


def swap_rows(u: Words, chance: np.random.Generator) -> None:
    first, second = chance.choice(len(u), 2, replace=False)
    u[[first, second]] = u[[second, first]]


def zeros(u: Words, chance: np.random.Generator) -> None:
    u[:] = 0


def top_bit(u: Words, chance: np.random.Generator) -> None:
    u[tuple(chance.integers(u.shape))] ^= np.int32(-(2**31))


def plus_or_minus_one(u: Words, chance: np.random.Generator) -> None:
    u[tuple(chance.integers(u.shape))] += np.int32(chance.choice([-1, 1]))


LIES: list[Callable[[Words, np.random.Generator], None]] = [
    flip_a_bit,
    change_a_word,
    change_a_row,
    swap_rows,
    zeros,
    top_bit,
    plus_or_minus_one,
]


class Peer:
    """Gives true products, then what `spoil` makes of them. Also the GPU side's honest answers."""

    failure = None  # its connection is never lost

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.quantized = {
            matrix: Quantized.of(torch.randn(*shape, generator=generator)) for matrix, shape in SHAPES.items()
        }
        self._weights = {matrix: RingWeight(weight.digits, CPU) for matrix, weight in self.quantized.items()}
        self._ring = Ring(CPU, SHAPES.values())
        self._stream = KeyStream()
        self.before: dict[Matrix, Words] = {}

    def product(self, matrix: Matrix, words: Words) -> Words:
        out = torch.empty(len(words), SHAPES[matrix][0], dtype=torch.int32)
        return self._ring.product(torch.from_numpy(words), self._weights[matrix], out).numpy()

    def spoil(self, matrix: Matrix, words: Words, product: Words) -> Words:
        return product

    async def ask(self, matrix: Matrix, rows: int) -> Batch:
        size = row_words(SHAPES[matrix][1])
        address = self._stream.take(rows * size)
        words = self._stream.words(address, (rows, size))
        return Batch(self._stream, address, self.spoil(matrix, words, self.product(matrix, words)))

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def peer() -> Peer:
    return Peer()


@pytest.fixture(scope="module")
def guards(peer: Peer) -> dict[Matrix, Guard]:
    return {matrix: Guard.of(weight, b"", None, checked=True) for matrix, weight in peer.quantized.items()}


async def exchange(peer: Peer, guards: dict[Matrix, Guard], pads: PeerPads, x: Words, out: Words) -> None:
    """One block of a call, with an honest GPU side."""
    sealed = await Shield(guards, pads, 8, 1, CAUGHT_EITHER).seal(*MATRIX, (x,), (out,))
    answer = peer.product(MATRIX, sealed.inputs[0])
    sealed.sent()
    np.copyto(sealed.room[0], answer)
    sealed.open()


async def told(peer: Peer, guards: dict[Matrix, Guard], spoil: Callable[[Matrix, Words, Words], Words]) -> int:
    """Lets the peer lie for a while -> how many lies differed from the truth. All of them were caught."""
    differing = [0]

    def lie(matrix: Matrix, words: Words, product: Words) -> Words:
        wrong = spoil(matrix, words, product)
        lies.append(not np.array_equal(wrong, product))
        return wrong

    chance, lies = np.random.default_rng(11), list[bool]()
    while differing[0] < LIES_OF_EACH_KIND:
        peer.spoil = lambda matrix, words, product: product  # type: ignore[method-assign]
        pads = PeerPads(peer, SHAPES, Budget(1 << 20, 1, ROWS))  # type: ignore[arg-type]
        x = chance.standard_normal((ROWS, SHAPES[MATRIX][1])).astype(np.float32)
        out = np.full((ROWS, SHAPES[MATRIX][0]), np.nan, np.float32)
        await pads.prepare(ROWS)
        await exchange(peer, guards, pads, x, out)
        assert np.isfinite(out).all(), "the truth passes"
        await pads.close()
        lies.clear()
        peer.spoil = lie  # type: ignore[method-assign]
        for _ in range(50):
            batch = await peer.ask(MATRIX, ROWS)
            pads._shelves[MATRIX].stock.put(batch)
            out[:] = np.nan
            if not lies[-1]:
                await exchange(peer, guards, pads, x, out)
                continue
            with pytest.raises(asynctsqp.IntegrityError):
                await exchange(peer, guards, pads, x, out)
            assert np.isnan(out).all(), "something of a wrong answer was passed on"
            differing[0] += 1
    return differing[0]


@pytest.mark.parametrize("lie", LIES)
def test_every_lie_is_caught(lie: Callable[[Words, np.random.Generator], None], peer: Peer, guards: Any) -> None:
    chance = np.random.default_rng(7)

    def spoil(matrix: Matrix, words: Words, product: Words) -> Words:
        wrong = product.copy()
        lie(wrong, chance)
        return wrong

    assert asyncio.run(told(peer, guards, spoil)) >= LIES_OF_EACH_KIND


def test_a_replayed_answer_is_caught(peer: Peer, guards: Any) -> None:
    before = [peer.product(MATRIX, np.ones((ROWS, SHAPES[MATRIX][1]), np.int32))]

    def spoil(matrix: Matrix, words: Words, product: Words) -> Words:
        before.append(product)
        return before[-2]

    assert asyncio.run(told(peer, guards, spoil)) >= LIES_OF_EACH_KIND


def test_the_previous_layers_answer_is_caught(peer: Peer, guards: Any) -> None:
    """Of the same words, with the weights of the layer before."""
    previous = (MATRIX[0], MATRIX[1] - 1)
    found = asyncio.run(told(peer, guards, lambda matrix, words, product: peer.product(previous, words)))
    assert found >= LIES_OF_EACH_KIND


def test_that_is_ten_thousand_lies() -> None:
    assert (len(LIES) + 2) * LIES_OF_EACH_KIND >= 10_000


@pytest.fixture(scope="module")
def products(tiny_model: Callable[[str], Path]) -> TrueProducts:
    return TrueProducts(tiny_model("gqa"))


def spoiled(spoil: Callable[[Words, np.random.Generator], None]) -> Callable[[MaskCall, Words, MaskPeerThread], Words]:
    chance = np.random.default_rng(3)

    def lie(call: MaskCall, u: Words, peer: MaskPeerThread) -> Words:
        if (call.op, call.layer) != (Op.DOWN, 2):
            return u
        wrong = u.copy()
        spoil(wrong, chance)
        return wrong

    return lie


def everywhere(spoil: Callable[[Words], None]) -> Callable[[Words, np.random.Generator], None]:
    """In all rows, so that whichever is used is wrong."""

    def all_rows(u: Words, chance: np.random.Generator) -> None:
        spoil(u)

    return all_rows


def add_one(u: Words) -> None:
    u[:, 0] += np.int32(1)


def flip_top(u: Words) -> None:
    u[:, -1] ^= np.int32(-(2**31))


def rotate(u: Words) -> None:
    u[:] = np.roll(u, 1, axis=0)


@pytest.mark.parametrize("spoil", [everywhere(add_one), everywhere(flip_top), everywhere(rotate), zeros])
def test_no_token_is_released(
    spoil: Callable[[Words, np.random.Generator], None], connect: Callable[..., Engine], products: TrueProducts
) -> None:
    """Through a real GPU side, and over the real protocol."""

    async def run() -> None:
        with mask_peer_thread(products, spoiled(spoil)) as peer:
            async with connect(protect="full", **peer.options) as engine:
                released = list[asynctsqp.Piece]()

                async def consume() -> None:
                    released.extend([piece async for piece in engine.generate(PROMPT, max_new_tokens=8)])

                with pytest.raises(asynctsqp.IntegrityError, match="or the mask peer was caught"):
                    await consume()
                assert not released
                with pytest.raises(asynctsqp.IntegrityError):
                    await engine.complete([1, 2, 3], max_new_tokens=1)

    asyncio.run(run())


def test_the_command_ends_with_4(
    tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path], products: TrueProducts
) -> None:
    flags = ("--model", str(tiny_model("gqa")), "--gpu", tiny_gpu.endpoint, "--protect", "full", "--json")
    generate = ("--prompt", "Once upon a time", "--max-new-tokens", "4")
    with mask_peer_thread(products, spoiled(zeros)) as peer:
        ended = run_tee(*flags, *generate, *peer.flags)
    assert_one_error(ended, 4, CAUGHT_EITHER)
    assert not ended.out
    with mask_peer_thread(products) as peer:  # the same without the lie
        ended = run_tee(*flags, *generate, *peer.flags)
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["completion_tokens"] == 4


def test_answers_of_another_size_are_refused(connect: Callable[..., Engine], products: TrueProducts) -> None:
    async def run(lie: Callable[[MaskCall, Words, MaskPeerThread], Words]) -> None:
        with mask_peer_thread(products, lie) as peer:
            async with connect(protect="full", **peer.options) as engine:
                with pytest.raises(asynctsqp.GpuSideError, match="mask peer"):
                    await engine.complete(PROMPT, max_new_tokens=400, ignore_eos=True)

    for lie in (lambda call, u, peer: u[:-1], lambda call, u, peer: u.repeat(2, 0), lambda call, u, peer: u[:0]):
        asyncio.run(run(lie))


def test_pads_are_used_through_the_guards(guards: Any) -> None:
    """Nothing here would notice if Pad let a reply through as it is: that it does not."""
    reply = np.arange(8, dtype=np.int32).reshape(2, 4)
    pad = Pad(np.zeros((2, 3), np.int32), np.ones((1, 4), np.int32), np.full((1, 4), 2, np.int32))
    assert pad.unmask(reply).tolist() == [[-1, 0, 1, 2], [2, 3, 4, 5]]
