"""Attention over blocks against plain softmax attention, and the accounting of KV memory."""

from __future__ import annotations

import asyncio

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asynctsqp.errors import PromptError
from asynctsqp.model_spec import ModelSpec
from tee_side.attention import attend
from tee_side.kv_cache import KVCache, KVMemory
from tests import textbook
from tests.textbook import last

SPEC = ModelSpec(
    hidden_size=48,
    intermediate_size=64,
    layers=2,
    heads=6,
    kv_heads=2,
    head_dim=8,
    vocab_size=100,
    max_positions=4096,
    rms_norm_eps=1e-5,
    tied_embedding=True,
    attention_bias=False,
    mlp_bias=False,
)
TOKEN_BYTES = SPEC.layers * 2 * SPEC.kv_heads * SPEC.head_dim * 4


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=8),
    st.integers(0, 150),
    st.integers(0, 10_000),
)
def test_any_sequence_of_chunks_and_steps_is_plain_attention(chunks: list[int], steps: int, seed: int) -> None:
    lengths = chunks + [1] * steps
    total = sum(lengths)
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(total, SPEC.heads, SPEC.head_dim, generator=generator)
    k, v = torch.randn(2, total, SPEC.kv_heads, SPEC.head_dim, generator=generator)
    cache = KVCache(SPEC, chunks[0], total)
    outputs, start = [], 0
    for length in lengths:
        rows = slice(start, start + length)
        span = cache.extend(length)
        assert span.position == start
        cache.store(1, span, k[rows].transpose(0, 1).numpy(), v[rows].transpose(0, 1).numpy())
        *before, own = ((keys[1], values[1]) for keys, values in cache.runs(span))
        outputs.append(torch.from_numpy(last(attend(q[rows].numpy(), before, own, whole=False))))
        start += length
    everything = k.transpose(0, 1).numpy(), v.transpose(0, 1).numpy()
    exact = textbook.attention(q.numpy(), [everything])
    torch.testing.assert_close(torch.cat(outputs).double(), exact, rtol=1e-5, atol=1e-5)


def test_a_growing_sequence_is_never_moved() -> None:
    cache = KVCache(SPEC, 10, 3000)
    addresses: dict[int, int] = {}
    for _ in range(3000):
        cache.extend(1)
        for index, block in enumerate(cache._blocks):
            assert addresses.setdefault(index, block.keys.ctypes.data) == block.keys.ctypes.data
    assert len(addresses) < 10
    assert sum(block.tokens for block in cache._blocks) <= 3000 + 64


def test_a_full_memory_makes_the_next_one_wait_and_loses_none() -> None:
    async def run() -> list[str]:
        memory = KVMemory(SPEC, 128 * TOKEN_BYTES)
        log: list[str] = []

        async def hold(name: str, tokens: int, leave: asyncio.Event) -> None:
            async with memory.sequence(tokens, 0):
                log.append(name)
                await leave.wait()

        first_leaves, rest_leave = asyncio.Event(), asyncio.Event()
        first = asyncio.create_task(hold("first", 100, first_leaves))
        await asyncio.sleep(0)
        rest = [asyncio.create_task(hold(name, 60, rest_leave)) for name in ("second", "third", "fourth")]
        await asyncio.sleep(0)
        rest[1].cancel()  # waits in the queue: its place must go with it
        await asyncio.sleep(0)
        assert log == ["first"]
        first_leaves.set()
        await first
        await asyncio.sleep(0)
        rest_leave.set()
        await asyncio.gather(*rest, return_exceptions=True)
        assert memory.reserved_bytes == 0
        return log

    assert asyncio.run(run()) == ["first", "second", "fourth"]


def test_one_who_leaves_in_the_moment_of_being_admitted_takes_no_room() -> None:
    async def run() -> None:
        memory = KVMemory(SPEC, 128 * TOKEN_BYTES)

        async def hold(tokens: int, leave: asyncio.Event) -> None:
            async with memory.sequence(tokens, 0):
                await leave.wait()

        leave = asyncio.Event()
        first, second, third = (asyncio.create_task(hold(tokens, leave)) for tokens in (100, 100, 60))
        await asyncio.sleep(0)
        first.cancel()  # gives its room back in the same turn of the loop
        second.cancel()  # in which the next in the queue leaves
        await asyncio.wait((first, second))
        assert memory.reserved_bytes == 64 * TOKEN_BYTES
        leave.set()
        await third
        assert memory.reserved_bytes == 0

    asyncio.run(run())


def test_what_can_never_fit_is_refused_at_once() -> None:
    async def ask() -> None:
        async with KVMemory(SPEC, 128 * TOKEN_BYTES).sequence(100, 100):
            pass

    with pytest.raises(PromptError, match="--kv-memory"):
        asyncio.run(ask())
