"""Compressed payloads: what is made, that it comes back, and that no sender can make a receiver allocate at will.

Oracles: numpy's own transposition and transposed views, and the lz4 and zstandard libraries by themselves.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tracemalloc
from collections.abc import Callable

import lz4.block
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from asynctsqp.compression import LEAST_BYTES, NAMES, Compression
from asynctsqp.errors import BadInputError, ProtocolError

GIB = 1 << 30
SIZE = 8 << 20
SLACK = 1 << 20  # for the libraries' own state
COMPRESSED = ("lz4", "zstd")
ITEM_SIZES = (2, 4)

inflate: dict[str, Callable[[bytes, int], bytes]] = {
    "lz4": lambda data, size: lz4.block.decompress(data, uncompressed_size=size),
    "zstd": lambda data, size: zstandard.ZstdDecompressor().decompress(data, max_output_size=size),
}


def activations(size: int, itemsize: int, seed: int = 0) -> memoryview:
    """Normally distributed float32 or bfloat16 (float32's upper half: little-endian), as raw bytes."""
    values = np.random.default_rng(seed).standard_normal(size // itemsize, np.float32)
    return memoryview(values.view(np.uint8).reshape(-1, 4)[:, 4 - itemsize :].tobytes())


def shuffled(raw: memoryview, itemsize: int) -> bytes:
    return b"".join(bytes(raw[k::itemsize]) for k in range(itemsize))


def deflate(name: str, data: bytes) -> bytes:
    return zstandard.compress(data, 1) if name == "zstd" else lz4.block.compress(data, store_size=False)


def packed(name: str, size: int = SIZE, itemsize: int = 4) -> bytes:
    made = bytes(Compression(name).pack(activations(size, itemsize), itemsize))
    assert len(made) < size
    return made


def refuse(name: str, payload: bytes, size: int = SIZE, itemsize: int = 4) -> None:
    with pytest.raises(ProtocolError) as caught:
        Compression(name).unpack(memoryview(payload), size, itemsize)
    assert "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    itemsize=st.sampled_from(ITEM_SIZES),
    items=st.integers(-3, 3),
    least=st.sampled_from([0, 16, LEAST_BYTES, 2 * LEAST_BYTES]),
    scale=st.sampled_from(["activations", "zeros", "noise"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_is_packed_comes_back(name: str, itemsize: int, items: int, least: int, scale: str, seed: int) -> None:
    size = max(0, least + items * itemsize)
    raw = {
        "activations": lambda: activations(size, itemsize, seed),
        "zeros": lambda: memoryview(bytes(size)),
        "noise": lambda: memoryview(np.random.default_rng(seed).bytes(size)),
    }[scale]()
    compression = Compression(name)
    made = compression.pack(raw, itemsize)
    back = compression.unpack(memoryview(made), size, itemsize)
    assert back == raw
    assert (back.ndim, back.format, back.nbytes) == (1, "B", size)
    assert made is raw or len(made) < size


@pytest.mark.parametrize("name", COMPRESSED)
@pytest.mark.parametrize("itemsize", ITEM_SIZES)
def test_it_is_the_shuffled_bytes_that_are_compressed(name: str, itemsize: int) -> None:
    raw = activations(SIZE, itemsize)
    assert inflate[name](packed(name, SIZE, itemsize), SIZE) == shuffled(raw, itemsize)


@pytest.mark.parametrize("name", COMPRESSED)
@pytest.mark.parametrize("itemsize", ITEM_SIZES)
def test_what_another_compressor_made_is_understood(name: str, itemsize: int) -> None:
    raw = activations(SIZE, itemsize)
    payload = memoryview(deflate(name, shuffled(raw, itemsize)))
    assert Compression(name).unpack(payload, SIZE, itemsize) == raw


@pytest.mark.parametrize("name", NAMES)
def test_what_saves_nothing_is_left_alone(name: str) -> None:
    noise = memoryview(np.random.default_rng(1).bytes(SIZE))
    small = memoryview(bytes(LEAST_BYTES))
    compression = Compression(name)
    assert compression.pack(noise, 4) is noise
    assert compression.pack(small, 4) is small
    assert compression.unpack(noise, SIZE, 4) is noise


def test_none_compresses_nothing() -> None:
    zeros = memoryview(bytes(SIZE))
    assert Compression("none").pack(zeros, 4) is zeros


def test_the_threshold_is_where_it_is_said_to_be() -> None:
    assert LEAST_BYTES == 1 << 20
    assert len(Compression("lz4").pack(memoryview(bytes(LEAST_BYTES + 4)), 4)) < LEAST_BYTES


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(BadInputError, match="brotli"):
        Compression("brotli")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [0, 1, SIZE - 4, SIZE - 1, SIZE + 1, 2 * SIZE])
def test_a_payload_of_another_size_is_refused(name: str, length: int) -> None:
    refuse(name, bytes(length))


@pytest.mark.parametrize("name", COMPRESSED)
def test_a_small_tensor_never_comes_compressed(name: str) -> None:
    refuse(name, deflate(name, bytes(LEAST_BYTES)), LEAST_BYTES)
    refuse(name, b"", 4)
    refuse(name, b"x", 0)


@pytest.mark.parametrize("name", COMPRESSED)
@pytest.mark.parametrize("other", [0, 4, LEAST_BYTES, SIZE - 4, SIZE + 4, 2 * SIZE, 64 * SIZE])
def test_a_tensor_of_another_size_is_refused(name: str, other: int) -> None:
    refuse(name, deflate(name, bytes(other)))


@pytest.mark.parametrize("name", COMPRESSED)
def test_a_whole_payload_and_a_bit_is_refused(name: str) -> None:
    whole = packed(name)
    for end in (1, 2, 100, len(whole) // 2, len(whole) - 1):
        refuse(name, whole[:-end])
    for more in (b"\0", b"x" * 20, whole[: SIZE // 100]):
        refuse(name, whole + more)
    refuse(name, deflate(name, bytes(SIZE)) * 2)


@pytest.mark.parametrize("name", COMPRESSED)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_changed_payload_makes_the_right_size_or_is_refused(name: str, data: st.DataObject) -> None:
    size = 2 * LEAST_BYTES
    changed = bytearray(packed(name, size))
    # the headers as often as all the rest
    where = data.draw(st.one_of(st.integers(0, 31), st.integers(0, len(changed) - 1)))
    changed[where] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(ProtocolError):
        assert Compression(name).unpack(memoryview(changed), size, 4).nbytes == size


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(COMPRESSED), payload=st.binary(max_size=300), magic=st.booleans())
def test_garbage_is_refused(name: str, payload: bytes, magic: bool) -> None:
    refuse(name, b"\x28\xb5\x2f\xfd" * magic + payload)  # RFC 8878, 3.1.1: how a frame begins


def lz4_bomb(size: int) -> bytes:
    """One literal zero, copied on and on: by lz4's block format (4 + 15 + 255 n + last copies), then 5 literals."""
    copies, last = divmod(size - 1 - 4 - 15 - 5, 255)
    return b"\x1f\0\x01\0" + b"\xff" * copies + bytes([last]) + b"\x50" + bytes(5)


def zstd_bomb(claimed: int | None) -> bytes:
    """A frame that grows to 1 GiB, and claims `claimed` bytes in its header, or says nothing."""
    compressor = zstandard.ZstdCompressor(level=1, write_content_size=claimed is not None)
    stream = compressor.compressobj(size=GIB)
    frame = b"".join(stream.compress(bytes(1 << 24)) for _ in range(GIB >> 24)) + stream.flush()
    if claimed is None:
        return frame
    # RFC 8878, 3.1.1.1: magic 4, descriptor 1, window 1, then the content's size in 4
    forged = frame[:6] + claimed.to_bytes(4, "little") + frame[10:]
    assert zstandard.get_frame_parameters(forged).content_size == claimed
    return forged


def skippable(content: bytes) -> bytes:
    """RFC 8878, 3.1.2: a frame that stands for nothing; get_frame_parameters gives its length as content's size."""
    return b"\x50\x2a\x4d\x18" + len(content).to_bytes(4, "little") + content


BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "lz4": ("lz4", lambda: lz4_bomb(GIB)),
    "zstd, honest about it": ("zstd", lambda: zstd_bomb(GIB)),
    "zstd, with the right claim": ("zstd", lambda: zstd_bomb(SIZE)),
    "zstd, without a claim": ("zstd", lambda: zstd_bomb(None)),
    "zstd, a claim without content": ("zstd", lambda: zstd_bomb(SIZE)[:20]),
    "zstd, the largest claim": ("zstd", lambda: zstd_bomb(2**32 - 1)),
    "zstd, a frame to skip": ("zstd", lambda: skippable(bytes(1000))),
    "zstd, a frame to skip of the right length": ("zstd", lambda: skippable(b"x" * SIZE)[: SIZE // 2]),
    "zstd, a frame to skip and a good one": ("zstd", lambda: skippable(b"") + packed("zstd")),
    # descriptor: size in 4 bytes; window: exponent 31 - 10
    "zstd, a window of 2 GiB": (
        "zstd",
        lambda: b"\x28\xb5\x2f\xfd" + bytes([0x80, 21 << 3]) + SIZE.to_bytes(4, "little") + bytes(1000),
    ),
}

# in a process of its own, since only there the peak is this call's: VmHWM, in kB
PEAK = """
import sys
from asynctsqp.compression import Compression
from asynctsqp.errors import ProtocolError

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))

payload = memoryview(sys.stdin.buffer.read())
before = peak()
try:
    Compression(sys.argv[1]).unpack(payload, int(sys.argv[2]), 4)
except ProtocolError:
    print("refused", peak() - before)
"""


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_and_takes_no_memory(bomb: str) -> None:
    name, make = BOMBS[bomb]
    payload = make()
    tracemalloc.start()
    try:
        refuse(name, payload)
        assert tracemalloc.get_traced_memory()[1] <= 2 * SIZE + SLACK
    finally:
        tracemalloc.stop()
    command = [sys.executable, "-c", PEAK, name, str(SIZE)]
    done = subprocess.run(command, input=payload, capture_output=True, timeout=60, check=True)
    verdict, grown = done.stdout.split()
    assert verdict == b"refused"
    assert int(grown) <= 2 * SIZE + SLACK


def test_the_bombs_are_live() -> None:
    """What the tests above refuse would otherwise grow: checked on smaller ones with the libraries themselves."""
    assert lz4.block.decompress(lz4_bomb(SIZE), uncompressed_size=SIZE) == bytes(SIZE)
    stream = zstandard.ZstdDecompressor().decompressobj()
    assert len(stream.decompress(zstd_bomb(None)[: 1 << 12])) > SIZE


@pytest.mark.parametrize("name", COMPRESSED)
def test_an_honest_payload_takes_twice_its_size_at_most(name: str) -> None:
    payload = memoryview(packed(name))
    tracemalloc.start()
    try:
        Compression(name).unpack(payload, SIZE, 4)
        assert tracemalloc.get_traced_memory()[1] <= 2 * SIZE + SLACK
    finally:
        tracemalloc.stop()
