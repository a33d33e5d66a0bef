"""Lossless compression of tensors that travel as messages.

    items            a0 a1 a2 a3 | b0 b1 b2 b3 | c0 c1 c2 c3
    shuffled         a0 b0 c0 | a1 b1 c1 | a2 b2 c2 | a3 b3 c3        then lz4 or zstd

Of neighbouring floats the signs and exponents are alike and the low bits of the mantissas are noise. Side by side,
byte k of every item next to each other, the former compress and the latter do no harm. (The shuffle is the one of
HDF5 and Blosc.) Nothing here adds a flag: a payload is compressed if and only if it is smaller than the tensor,
whose size the receiver knows from a table of its own.

Compression hides nothing and proves nothing: a sender that wants to lie about values can.
"""

from __future__ import annotations

import lz4.block
import numpy as np
import numpy.typing as npt
import zstandard

from asynctsqp.errors import BadInputError, ProtocolError

NAMES = ("none", "lz4", "zstd")
LEAST_BYTES = 1 << 20  # up to here a payload travels as it is: what could be saved is less than the work
# Of shuffled float32 and bfloat16, level 2 and 3 save less than 1 and take 1.5 to 2 times as long; the negative
# levels leave out the entropy coding, which is what shrinks exponents
ZSTD_LEVEL = 1

Bytes = npt.NDArray[np.uint8]


class Compression:
    """One way to compress; keeps nothing between two payloads, and may be used from several threads."""

    def __init__(self, name: str) -> None:
        """name: one of NAMES, or BadInputError is raised."""
        if name not in NAMES:
            raise BadInputError(f"there is no compression {name!r}: choose one of {', '.join(NAMES)}")
        self.name = name

    def pack(self, payload: memoryview, itemsize: int) -> memoryview | bytes:
        """What to send for a tensor's raw bytes: compressed, or `payload` itself where that saves nothing.

        payload: contiguous, a whole number of items of `itemsize` bytes, and less than 2 GiB (lz4's limit).
        """
        if self.name == "none" or payload.nbytes <= LEAST_BYTES:
            return payload
        shuffled = _shuffle(payload, itemsize).data
        packed = _lz4_pack(shuffled) if self.name == "lz4" else _zstd_pack(shuffled)
        return packed if len(packed) < payload.nbytes else payload

    def unpack(self, payload: memoryview, size: int, itemsize: int) -> memoryview:
        """The raw bytes of a tensor, `size` of them, out of what `pack` made of it.

        size: bytes, a whole number of items, from the receiver's own table.
        Allocates at most about twice `size`, whatever a hostile sender's payload claims or would grow to.
        Raises ProtocolError for a payload that does not make exactly `size` bytes.
        """
        if payload.nbytes == size:
            return payload
        if self.name == "none" or size <= LEAST_BYTES or payload.nbytes > size:
            raise ProtocolError(f"a tensor of {size} bytes came as {payload.nbytes}")
        shuffled = _lz4_unpack(payload, size) if self.name == "lz4" else _zstd_unpack(payload, size)
        if len(shuffled) != size:
            raise ProtocolError(f"a compressed tensor of {size} bytes grew to {len(shuffled)}")
        return _unshuffle(shuffled, itemsize).data


def _shuffle(payload: memoryview, itemsize: int) -> Bytes:
    """[items, itemsize] bytes -> [itemsize, items], flat."""
    items = np.frombuffer(payload, np.uint8).reshape(-1, itemsize)
    return np.ascontiguousarray(items.T).reshape(-1)


def _unshuffle(shuffled: bytes, itemsize: int) -> Bytes:
    """[itemsize, items] bytes -> [items, itemsize], flat."""
    planes = np.frombuffer(shuffled, np.uint8).reshape(itemsize, -1)
    items = np.empty(planes.shape[::-1], np.uint8)
    # numpy's own transposition runs over the few bytes of one item innermost, which takes 3 to 5 times as long
    for k, plane in enumerate(planes):
        items[:, k] = plane
    return items.reshape(-1)


def _lz4_pack(shuffled: memoryview) -> bytes:
    packed: bytes = lz4.block.compress(shuffled, store_size=False)
    return packed


def _lz4_unpack(payload: memoryview, size: int) -> bytes:
    """A block has no header to lie in: the library writes into `size` bytes, and fails where they are too few."""
    try:
        shuffled: bytes = lz4.block.decompress(payload, uncompressed_size=size)
        return shuffled
    except lz4.block.LZ4BlockError:
        raise ProtocolError("a compressed tensor is no lz4 block of its size") from None


def _zstd_pack(shuffled: memoryview) -> bytes:
    return zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(shuffled)


def _zstd_unpack(payload: memoryview, size: int) -> bytes:
    """The library allocates what a frame's header claims, and no limit given to it counts then: so look first."""
    try:
        claimed = zstandard.get_frame_parameters(payload)
        # a window larger than the content is never made: the header has a form of its own for "all of it"
        if claimed.content_size != size or claimed.window_size > size:
            raise ProtocolError(f"a compressed tensor of {size} bytes claims to be something else")
        return zstandard.ZstdDecompressor().decompress(payload, allow_extra_data=False)
    except zstandard.ZstdError:
        raise ProtocolError("a compressed tensor is no zstd frame of its size") from None
