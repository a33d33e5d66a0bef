"""One matrix's stock of pads that are ready: rows of u = r W^T, whoever made them.

A pad's words r come from the key stream and are made again, some rows ahead, when the pad is used, so only u is kept:
4 N bytes for each row and matrix. Rows that came in one go are a batch; each row leaves the stock once and nothing puts
one back.

Covered: a row goes into at most one pad; a call that fails, is cancelled or is made again burns its own. A batch has
the key stream that it was made with, so rows of an earlier key stay good after a new one.
Not covered: u itself being right, which tee_side/freivalds finds out when it is used; two threads at once: whoever has
some puts and withdraws under a lock (`pad` needs none).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from asynctsqp.integer_weights import Matrix
from asynctsqp.key_stream import BLOCK_WORDS, KeyStream, Words, row_blocks, row_words
from tee_side.masking import Pad

AHEAD = 16  # rows whose words are made at once: a decode step would spend more on asking than on AES

NOTHING: Words = np.empty((0, 0), dtype=np.int32)


def words_ahead_bytes(shapes: Mapping[Matrix, tuple[int, int]]) -> int:
    """What the words that are made ahead take at most. shapes: (N, K) of every matrix."""
    return AHEAD * sum(4 * row_words(width) for _, width in shapes.values())


@dataclass
class Batch:
    """Some rows of u; those before `used` are gone. address: of their words in the stream.

    ahead: words of r, and the row of the first of them.
    """

    stream: KeyStream
    address: int
    product: Words
    used: int = 0
    ahead: tuple[int, Words] = (0, NOTHING)

    @property
    def left(self) -> int:
        return len(self.product) - self.used

    def words(self, rows: slice, width: int) -> Words:
        """Some rows of r: [n, width]. Threads that come at once make them twice; neither sees half of them."""
        first, words = self.ahead
        if not first <= rows.start < rows.stop <= first + len(words):
            stop = max(rows.stop, min(rows.start + AHEAD, len(self.product)))
            first = rows.start
            words = self.stream.words(self._address_of(first, width), (stop - first, row_words(width)))
            self.ahead = (first, words) if len(words) <= AHEAD else (0, NOTHING)
        return words[rows.start - first : rows.stop - first, :width]

    def fill(self, rows: slice, width: int, room: Words) -> None:
        """The same, [n, row_words(width)], into room that KeyStream.fill can use."""
        count = (rows.stop - rows.start) * row_words(width)
        self.stream.fill(self._address_of(rows.start, width), count, room)

    def _address_of(self, row: int, width: int) -> int:
        return self.address + row * row_blocks(width)


Part = tuple[Batch, slice]


class Stock:
    """rows: left in all batches together; promised: rows that are on their way here."""

    def __init__(self, channels: int, width: int) -> None:
        """Of a matrix W: [channels, width]."""
        self.channels = channels
        self.width = width
        self.row_bytes = 4 * channels
        self.rows = 0
        self.promised = 0
        self._batches: deque[Batch] = deque()  # the oldest first

    @property
    def nbytes(self) -> int:
        """What is promised included. A batch's memory goes when its last row does."""
        return sum(batch.product.nbytes for batch in self._batches) + self.row_bytes * self.promised

    def put(self, batch: Batch) -> None:
        self._batches.append(batch)
        self.rows += batch.left

    def withdraw(self, rows: int) -> list[Part]:
        """Takes the oldest rows out, of which there must be enough; a batch without rows is forgotten."""
        parts = []
        self.rows -= rows
        while rows:
            batch = self._batches[0]
            count = min(rows, batch.left)
            parts.append((batch, slice(batch.used, batch.used + count)))
            batch.used += count
            rows -= count
            if not batch.left:
                self._batches.popleft()
        return parts

    def pad(self, parts: Sequence[Part]) -> Pad:
        """Of rows that were withdrawn."""
        products = [batch.product[rows] for batch, rows in parts]
        if len(parts) == 1:
            batch, rows = parts[0]
            return Pad(batch.words(rows, self.width), *products)
        total, size = sum(map(len, products)), row_words(self.width)
        made = np.empty(total * size + BLOCK_WORDS, dtype=np.int32)
        start = 0
        for batch, rows in parts:
            batch.fill(rows, self.width, made[start * size :])
            start += rows.stop - rows.start
        return Pad(made[: total * size].reshape(total, size)[:, : self.width], *products)
