"""How many rows one request to a mask peer is for: both sides' limit, from the matrix's own sizes."""

from __future__ import annotations

from asynctsqp.key_stream import row_words
from asynctsqp.limits import MASK_BLOCK_BYTES


def most_rows(channels: int, width: int) -> int:
    """Of one request about W: [channels, width]. Its masks and their products are MASK_BLOCK_BYTES each, or a row."""
    return max(1, MASK_BLOCK_BYTES // (4 * max(channels, row_words(width))))
