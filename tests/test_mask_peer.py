"""Masks from a second party: the same tokens, over real processes, through losses, crowds and cancellations."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from asynctsqp import Engine
from asynctsqp.errors import GpuSideLost, HandshakeRefused
from asynctsqp.key_stream import row_blocks
from asynctsqp.model_spec import Op
from tests.conftest import GpuProcess, MaskPeerProcess
from tests.mask_peers import MaskPeerThread, TrueProducts, Wire, mask_peer_thread
from tests.processes import assert_one_error, run_tee, tee_process

PROMPT = [1, *range(100, 140)]
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
SMALL = 4 << 20  # for masks: some twenty tokens of the tiny model
Connect = Callable[..., Engine]


@pytest.fixture(scope="module")
def products(tiny_model: Callable[[str], Path]) -> TrueProducts:
    return TrueProducts(tiny_model("gqa"))


async def answers(engine: Engine, prompts: list[list[int]], tokens: int = 16) -> list[list[int]]:
    done = await asyncio.gather(*(engine.complete(prompt, max_new_tokens=tokens, **GREEDY) for prompt in prompts))
    return [one.token_ids for one in done]


@pytest.mark.parametrize("options", [{}, {"weight_bits": 12, "transport": "binary"}, {"protect": "mask"}], ids=str)
def test_peer_and_bank_and_no_masks_give_the_same_tokens(
    options: dict[str, Any], connect: Connect, tiny_mask_peer: MaskPeerProcess
) -> None:
    """Products of integers are exact, so masks change no bit of them: `verify` has none at all."""
    prompts = [PROMPT, [1, *range(300, 500)]]
    full = {"protect": "full"} | options
    ways = [full | {"protect": "verify"}, full, full | tiny_mask_peer.options]

    async def run() -> list[list[list[int]]]:
        found = []
        for way in ways:
            async with connect(**way) as engine:
                found.append(await answers(engine, prompts))
        return found

    plain, bank, peer = asyncio.run(run())
    assert plain == bank == peer
    assert len({*plain[0]}) > 3, "tokens that are all alike would tell nothing"


def test_a_crowd_with_little_memory(connect: Connect, tiny_mask_peer: MaskPeerProcess) -> None:
    """Prompts that are longer than the stock, decodes beside them, and some who leave: none is given another's pad."""
    prompts = [[1, *range(start, start + 20 * size)] for size, start in enumerate(range(100, 900, 100), start=1)]

    async def run() -> None:
        async with connect(protect="verify") as engine:
            expected = await answers(engine, prompts)
        async with connect(protect="full", mask_memory=SMALL, chunk_tokens=64, **tiny_mask_peer.options) as engine:
            assert await answers(engine, prompts) == expected
            leaving = [
                asyncio.create_task(engine.complete(prompt, max_new_tokens=300, **GREEDY)) for prompt in prompts[:4]
            ]
            await asyncio.sleep(0.05)
            staying = asyncio.create_task(answers(engine, prompts))
            await asyncio.sleep(0.05)
            for task in leaving:
                task.cancel()
            assert await staying == expected
            outcomes = await asyncio.gather(*leaving, return_exceptions=True)
            assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
            assert await answers(engine, prompts) == expected

    asyncio.run(run())


def ranges(peer: MaskPeerThread) -> dict[bytes, list[range]]:
    """The blocks of each session's key stream that were asked for."""
    found: dict[bytes, list[range]] = {}
    for key, call in peer.asked:
        width = peer.products.spec.linears[Op(call.op)].in_features
        found.setdefault(key, []).append(range(call.address, call.address + call.rows * row_blocks(width)))
    return found


def overlaps(blocks: list[range]) -> int:
    ordered = sorted(blocks, key=lambda part: part.start)
    return sum(one.stop > other.start for one, other in pairwise(ordered))


def test_no_address_is_asked_for_twice(connect: Connect, products: TrueProducts) -> None:
    """With prompts, decodes, a cancelled call, and the peer's connection lost in between."""
    with mask_peer_thread(products) as peer:
        wire = Wire(peer.endpoint)

        async def run() -> None:
            options = {"mask_peer": wire.endpoint, "mask_peer_key": peer.key}
            async with connect(protect="full", mask_memory=SMALL, chunk_tokens=64, reconnect_s=10, **options) as engine:
                first = await answers(engine, [PROMPT, [1, *range(300, 400)]])
                going = [asyncio.create_task(answers(engine, [PROMPT, [1, *range(300, 400)]])) for _ in range(3)]
                await asyncio.sleep(0.05)
                going[0].cancel()
                wire.cut()
                assert await going[1] == await going[2] == first

        try:
            asyncio.run(run())
        finally:
            wire.close()
    found = ranges(peer)
    assert len(found) == len(peer.greetings) == len(set(peer.greetings)) == 2, "a connection has a key of its own"
    for blocks in found.values():
        assert len(blocks) > 50
        assert overlaps(blocks) == 0
        assert overlaps([*blocks, blocks[0]]) == 1, "the check would see it"


def test_what_passes_by_is_unreadable(connect: Connect, products: TrueProducts) -> None:
    """A wire that listens sees neither the key of the stream nor a product; the peer at its end has both."""
    with mask_peer_thread(products) as peer:
        wire = Wire(peer.endpoint)

        async def run() -> None:
            async with connect(
                protect="full", mask_memory=SMALL, mask_peer=wire.endpoint, mask_peer_key=peer.key
            ) as engine:
                await answers(engine, [PROMPT])

        try:
            asyncio.run(run())
        finally:
            wire.close()
    seen = wire.seen()
    sent = [products.of(key, call).tobytes() for key, call in peer.asked[:20]]
    assert len(seen) > sum(map(len, sent))
    assert all(key not in seen for key in peer.greetings)
    assert all(product[at : at + 16] not in seen for product in sent for at in range(0, len(product) - 16, 4001))


def test_another_key_is_refused(
    tiny_gpu: GpuProcess, tiny_model: Callable[[str], Path], products: TrueProducts
) -> None:
    """Somebody in between with a key of his own gets no message, and the user one line."""
    with mask_peer_thread(products) as impostor:
        other = impostor.key[:-1] + ("0" if impostor.key[-1] != "0" else "1")
        model = str(tiny_model("gqa"))
        flags = ("--mask-peer", impostor.endpoint, "--mask-peer-key", other)
        ended = run_tee("--model", model, "--gpu", tiny_gpu.endpoint, "--prompt", "Hi", "--protect", "full", *flags)
        assert_one_error(ended, 3, impostor.endpoint, "--mask-peer-key")
        assert not impostor.greetings


def test_a_peer_that_comes_back_changes_no_token(
    connect: Connect, start_mask_peer: Callable[..., MaskPeerProcess], tiny_model: Callable[[str], Path]
) -> None:
    model = tiny_model("gqa")
    peer = start_mask_peer(model)

    async def run() -> None:
        async with connect(protect="verify") as engine:
            expected = await answers(engine, [PROMPT], tokens=120)
        async with connect(protect="full", mask_memory=SMALL, reconnect_s=30, **peer.options) as engine:
            tokens: list[int] = []
            async for piece in engine.generate(PROMPT, max_new_tokens=120, **GREEDY):
                tokens.append(piece.token_id)
                if len(tokens) == 10:
                    peer.kill()
                    start_mask_peer(model, "--bind", peer.endpoint)
            assert [tokens] == expected

    asyncio.run(run())


def test_a_peer_that_comes_back_as_another_is_not_taken(
    connect: Connect, start_mask_peer: Callable[..., MaskPeerProcess], tiny_model: Callable[[str], Path]
) -> None:
    peer = start_mask_peer(tiny_model("gqa"))

    async def run() -> None:
        async with connect(protect="full", mask_memory=SMALL, reconnect_s=30, **peer.options) as engine:
            await answers(engine, [PROMPT])
            peer.kill()
            start_mask_peer(tiny_model("biases"), "--bind", peer.endpoint)
            with pytest.raises(HandshakeRefused, match=f"mask peer at {peer.endpoint}.*another model"):
                await answers(engine, [[1, *range(100, 400)]])

    asyncio.run(run())


def test_a_peer_that_is_gone_ends_the_tee_side_with_one_line(
    tiny_gpu: GpuProcess, start_mask_peer: Callable[..., MaskPeerProcess], tiny_model: Callable[[str], Path]
) -> None:
    peer = start_mask_peer(tiny_model("gqa"))
    flags = ("--model", str(tiny_model("gqa")), "--gpu", tiny_gpu.endpoint, "--protect", "full", *peer.flags)
    generate = ("--prompt", "Once upon a time", "--max-new-tokens", "440", "--temperature", "0", "--ignore-eos")
    with tee_process(*flags, *generate) as tee:
        tee.wait_for_text()
        peer.kill()
        killed = time.monotonic()
        ended = tee.end()
        assert time.monotonic() - killed < 2
    assert_one_error(ended, 3, "mask peer", peer.endpoint, "gone")


def test_an_engine_whose_peer_is_gone_says_so(
    connect: Connect, start_mask_peer: Callable[..., MaskPeerProcess], tiny_model: Callable[[str], Path]
) -> None:
    """As /health and asynctsqp_up do, which ask it; a connection that is made again is none that is lost."""

    async def run() -> None:
        for reconnect_s in (0, 30):
            peer = start_mask_peer(tiny_model("gqa"))
            async with connect(protect="full", reconnect_s=reconnect_s, **peer.options) as engine:
                await answers(engine, [PROMPT])
                assert engine.failure is None
                peer.kill()
                if reconnect_s:
                    assert engine.failure is None
                    continue
                async with asyncio.timeout(10):
                    while engine.failure is None:
                        await asyncio.sleep(0.01)
                assert "mask peer" in str(engine.failure)
                with pytest.raises(GpuSideLost, match="mask peer"):
                    await answers(engine, [PROMPT])

    asyncio.run(run())


@pytest.fixture
def silent_peer(products: TrueProducts) -> Iterator[MaskPeerThread]:
    """It greets, and gives nothing to the last layer's first matrix."""
    with mask_peer_thread(products, lambda call, told, peer: None if (call.op, call.layer) == (0, 2) else told) as peer:
        yield peer


def test_who_waits_for_masks_can_leave(connect: Connect, silent_peer: MaskPeerThread) -> None:
    async def run() -> None:
        async with connect(protect="full", **silent_peer.options) as engine:
            for _ in range(2):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.5):
                        await answers(engine, [PROMPT])

    asyncio.run(run())


def test_a_peer_that_never_answers_is_given_up(
    connect: Connect, silent_peer: MaskPeerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asynctsqp.rpc.CALL_DEADLINE_S", 1.0)
    monkeypatch.setattr("asynctsqp.rpc.Connection.call.__defaults__", ((), 1.0, lambda: None))

    async def run() -> None:
        async with connect(protect="full", **silent_peer.options) as engine:
            with pytest.raises(GpuSideLost, match=r"mask peer.*in time"):
                await asyncio.wait_for(answers(engine, [PROMPT]), 10)

    asyncio.run(run())
