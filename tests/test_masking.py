"""Scales, pads and the key stream: exact, uniform, used once."""

from __future__ import annotations

import math
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from asynctsqp import key_stream
from asynctsqp.errors import BadInputError, IntegrityError
from asynctsqp.key_stream import KeyStream
from asynctsqp.quantize import Quantized
from asynctsqp.ring import Ring, RingWeight
from tee_side.masking import Pad, Scale, dequantize
from tests.uniformity import FALSE_ALARM, WORDS, uniformity

CPU = torch.device("cpu")
RING = Ring(CPU, [(64, 64)])


def as_integers(weight: Quantized) -> np.ndarray:
    whole = np.zeros(weight.shape, dtype=np.int64)
    for digit in weight.digits.numpy():
        whole = whole * 128 + digit
    return whole


def product_of(words: np.ndarray, weight: Quantized) -> np.ndarray:
    out = torch.empty(len(words), weight.shape[0], dtype=torch.int32)
    return RING.product(torch.from_numpy(words), RingWeight(weight.digits, CPU), out).numpy()


def rows(kind: str, n: int, width: int, seed: int) -> np.ndarray:
    chance = np.random.default_rng(seed)
    x = chance.standard_normal((n, width)).astype(np.float32)
    if kind == "one large":
        x[:, chance.integers(width)] = 1e30
    if kind == "all alike":
        x[:] = x[0, 0]
    if kind == "tiny":
        x *= np.float32(1e-44)
    if kind == "zeros":
        x[:] = 0
    return x


KINDS = ["plain", "one large", "all alike", "tiny", "zeros"]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.integers(1, 5),
    st.integers(1, 90),
    st.integers(1, 90),
    st.sampled_from([8, 12]),
    st.integers(0, 10**6),
)
def test_a_masked_linear_is_the_integer_product(
    kind: str, n: int, width: int, channels: int, bits: int, seed: int
) -> None:
    weight = Quantized.of(torch.randn(channels, width, generator=torch.Generator().manual_seed(seed)), bits)
    x, _ = Scale(width, weight.norm()).quantize(rows(kind, n, width, seed))
    stream = KeyStream()
    mask = stream.words(stream.take(n * width), (n, width))
    pad = Pad(mask, product_of(mask, weight))
    sent = np.empty((n, width), dtype=np.int32)
    pad.mask(x, sent)
    y = pad.unmask(product_of(sent, weight))
    true = x.astype(np.int64).astype(object) @ as_integers(weight).astype(object).T
    np.testing.assert_array_equal(y.astype(np.int64), true.astype(np.int64))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(KINDS), st.integers(1, 2000), st.sampled_from([8, 12]), st.integers(0, 10**6))
def test_no_true_product_comes_near_wrapping(kind: str, width: int, bits: int, seed: int) -> None:
    """Also for the weights that are the worst for a row: the row itself."""
    x = rows(kind, 1, width, seed)
    with np.errstate(invalid="ignore", over="ignore"):
        aligned = torch.from_numpy(np.nan_to_num(x / np.abs(x).max(), nan=1.0))
    weight = Quantized.of(torch.cat([aligned, aligned.sign(), torch.ones(1, width)]), bits)
    whole, _ = Scale(width, weight.norm()).quantize(x)
    y = whole.astype(np.int64) @ as_integers(weight).T
    assert np.abs(y).max() <= 2**30
    assert np.abs(whole).max() <= 2**30
    alone = Quantized.of(aligned, bits)
    if kind == "plain":
        used, _ = Scale(width, alone.norm()).quantize(x)
        assert np.abs(used.astype(np.int64) @ as_integers(alone).T).max() > 0.99 * 2**30, "the rule gives bits away"


def test_the_result_is_that_of_the_float_product() -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(1))
    quantized = Quantized.of(weight, 12)
    x = rows("plain", 3, 64, 2)
    whole, scales = Scale(64, quantized.norm()).quantize(x)
    bias = np.arange(48, dtype=np.float32)
    integers = (whole @ as_integers(quantized).T).astype(np.int32)
    y = np.empty(integers.shape, np.float32)
    dequantize(integers, scales, quantized.scales.numpy(), bias, y)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, x @ weight.numpy().T + bias, atol=0.02)
    used = quantized.scales.numpy().astype(np.float64)[:, None] * as_integers(quantized)
    np.testing.assert_allclose(y, (scales * whole) @ used.T + bias, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_ends_the_call(bad: float) -> None:
    x = rows("plain", 3, 8, 0)
    x[1, 5] = bad
    with pytest.raises(IntegrityError, match="not finite"):
        Scale(8, 100.0).quantize(x)


def test_the_largest_floats_are_masked_too() -> None:
    x = np.full((1, 4096), np.finfo(np.float32).max, dtype=np.float32)
    whole, scales = Scale(4096, 127 * 64.0).quantize(x)
    np.testing.assert_allclose(whole * scales, x, rtol=1e-3)


def test_rows_too_wide_to_be_masked_are_refused() -> None:
    with pytest.raises(BadInputError, match="too wide"):
        Scale(1 << 22, 2047.0 * 2048)


def test_a_pad_is_used_once() -> None:
    pad = Pad(np.ones((1, 2), dtype=np.int32), np.ones((1, 3), dtype=np.int32))
    out = np.zeros((1, 2), dtype=np.int32)
    pad.mask(np.zeros((1, 2)), out)
    with pytest.raises(RuntimeError, match="twice"):
        pad.mask(np.zeros((1, 2)), out)
    pad.unmask(np.zeros((1, 3), dtype=np.int32))
    with pytest.raises(RuntimeError, match="twice"):
        pad.unmask(np.zeros((1, 3), dtype=np.int32))


def test_the_stream_is_aes_256_in_counter_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against single blocks in ECB, as SP 800-38A defines the mode; across the edge of what is made at once."""
    key = bytes(range(32))
    monkeypatch.setattr(key_stream.secrets, "token_bytes", lambda size: key[:size])
    stream = KeyStream()
    start = stream.take(3) + 5
    made = stream.words(start, (3, 11_111)).tobytes()
    block = Cipher(algorithms.AES256(key), modes.ECB()).encryptor()
    blocks = range(start, start + len(made) // 16 + 1)
    assert b"".join(block.update(n.to_bytes(16, "big")) for n in blocks)[: len(made)] == made


def test_two_streams_differ_and_one_repeats_itself() -> None:
    one, two = KeyStream(), KeyStream()
    assert not np.array_equal(one.words(0, (1, 100)), two.words(0, (1, 100)))
    np.testing.assert_array_equal(one.words(9, (5, 100)), one.words(9, (5, 100)))
    np.testing.assert_array_equal(one.words(9, (5, 100))[3], one.words(9 + 3 * 25, (1, 100))[0])


def test_no_range_is_handed_out_twice() -> None:
    stream, ranges = KeyStream(), list[tuple[int, int]]()
    together = threading.Barrier(8)

    def work(seed: int) -> None:
        chance, mine = np.random.default_rng(seed), []
        together.wait()
        for words in chance.integers(1, 50, 2000):
            start = stream.take(int(words))
            mine.append((start, start + math.ceil(words / 4)))
        ranges.extend(mine)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ranges.sort()
    assert len(ranges) == 16_000
    assert all(end <= start for (_, end), (start, _) in pairwise(ranges))


def test_threads_that_read_at_once_do_not_mix_their_words() -> None:
    stream = KeyStream()
    expected = [stream.words(address, (1, 30_000)) for address in range(0, 40_000, 5_000)]
    wrong = list[int]()

    def work(index: int) -> None:
        for _ in range(50):
            if not np.array_equal(stream.words(index * 5_000, (1, 30_000)), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_used_up_key_is_not_used_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_stream, "MOST_BLOCKS", 10)
    stream = KeyStream()
    stream.take(39)
    with pytest.raises(OverflowError, match="start it again"):
        stream.take(1)


@pytest.fixture(scope="module")
def activations(demo_model: Path) -> list[np.ndarray]:
    """What every linear of the demo model is given for a prompt of a hundred tokens."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    text = "The old lighthouse keeper wrote in his journal that the sea had been calm for eleven days. " * 8
    tokens = AutoTokenizer.from_pretrained(demo_model)(text, return_tensors="pt").input_ids[:, :110]
    model, seen = LlamaForCausalLM.from_pretrained(demo_model, dtype=torch.float32), []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].numpy()))
    with torch.no_grad():
        model(tokens)
    return seen


def test_what_is_sent_is_uniform(activations: list[np.ndarray]) -> None:
    """False alarm: 10^-6. The same tests see at once that what is masked is not uniform."""
    stream, sent, bare = KeyStream(), [], []
    for x in activations:
        whole, _ = Scale(x.shape[1], 1500.0).quantize(x)
        mask = stream.words(stream.take(x.size), x.shape)
        masked = np.empty(x.shape, dtype=np.int32)
        Pad(mask, mask).mask(whole, masked)
        sent.append(masked.ravel())
        bare.append(whole.astype(np.int32).ravel())
    words = np.concatenate(sent)
    assert words.size >= WORDS
    assert uniformity(words) > FALSE_ALARM
    assert uniformity(np.concatenate(bare)[:10_000]) < 1e-12
    biased = words.copy()
    biased[::250] &= ~np.int32(1 << 13)  # half of these had it set: ten standard deviations beyond the alarm
    assert uniformity(biased) < FALSE_ALARM, "one bit in five hundred words should be seen"
