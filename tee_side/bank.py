"""Pads made ahead of need: u = r W^T by the enclave itself, many rows at a time, one matrix after another.

Only u is kept, in batches (tee_side/stock).

    fill_next()   the matrix with the fewest rows left: load W, r, u = r W^T, put the batch in    (a filling thread)
    take()        the next rows of a matrix; where too few are left, makes them and some more       (any thread)

The lock guards the batches and the counts only; it is never held while weights are loaded or multiplied, so the event
loop never waits for the filling thread. Making u is as much work as the product itself: the bank moves it to idle
times and does it in larger pieces, it does not save it.

Covered: a range of the key stream goes into one batch, and each of its rows into at most one pad, across threads,
calls that fail and calls that are made again; nothing of it leaves the process's memory, so that no old pad can be
brought back.
Not covered: what the level of the bank tells by the timing of the calls; u itself being right, which tee_side/freivalds
finds out when it is used.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import numpy as np
import torch

from asynctsqp.integer_weights import Matrix
from asynctsqp.key_stream import KeyStream, Words, row_words
from asynctsqp.limits import DECODE_ROWS
from asynctsqp.ring import Ring, RingWeight
from tee_side.masking import Pad
from tee_side.stock import Batch, Stock, words_ahead_bytes

MOST_ROWS = 256  # of a batch: more are hardly faster, and come later
FIRST_SPARE = 8  # rows that are made beyond those asked for, the first time; each time twice as many

Load = Callable[[Matrix], RingWeight]  # any thread may call it; the bank keeps no reference to the result


class Bank:
    """The pads of one model."""

    def __init__(
        self, shapes: Mapping[Matrix, tuple[int, int]], load: Load, ring: Ring, stream: KeyStream, limit: int
    ) -> None:
        """shapes: (N, K) of every matrix; load: reads one, as Quantized makes it; limit: bytes of u that are kept."""
        self._stocks = {matrix: Stock(n, k) for matrix, (n, k) in shapes.items()}
        self._spare = dict.fromkeys(shapes, FIRST_SPARE)  # rows to be made beyond those that are missing
        self._load, self._ring, self._stream = load, ring, stream
        self._lock = threading.Lock()
        self.row_bytes = sum(stock.row_bytes for stock in self._stocks.values())  # of a token's way through all
        self._most_rows = max(0, limit - words_ahead_bytes(shapes)) // self.row_bytes
        # Two batches fit: one is used while the next one is made
        self.batch_rows = min(MOST_ROWS, self._most_rows // 2)

    @property
    def rows(self) -> int:
        """Tokens that can be served from what is there."""
        with self._lock:
            return min(stock.rows for stock in self._stocks.values())

    def progress(self, tokens: int) -> tuple[int, int]:
        """Of the rows that so many tokens need, or that fit: those that are there, and all."""
        wanted = min(tokens, self._most_rows)
        with self._lock:
            return sum(min(stock.rows, wanted) for stock in self._stocks.values()), wanted * len(self._stocks)

    @property
    def nbytes(self) -> int:
        with self._lock:
            return sum(stock.nbytes for stock in self._stocks.values())

    def fill_next(self) -> bool:
        """Makes one batch for the matrix that has the fewest rows. -> whether there was room for one."""
        rows = self.batch_rows
        with self._lock:
            matrix, stock = min(self._stocks.items(), key=lambda item: item[1].rows + item[1].promised)
            room = self._most_rows * stock.row_bytes - stock.nbytes
            if rows < 1 or room < rows * stock.row_bytes:
                return False
            stock.promised += rows
        try:
            batch, _ = self._make(matrix, rows)
            with self._lock:
                stock.put(batch)
        finally:
            with self._lock:
                stock.promised -= rows
        return True

    def take_ready(self, matrix: Matrix, rows: int) -> Pad | None:
        """`take`, if they are made already: it is then a matter of microseconds, and no other thread's."""
        stock = self._stocks[matrix]
        with self._lock:
            parts = stock.withdraw(rows) if stock.rows >= rows else None
        return None if parts is None else stock.pad(parts)

    def take(self, matrix: Matrix, rows: int) -> Pad:
        """The pad of one call. Where the bank holds too few rows all of them are made now, and what it has is kept.

        A row by itself costs ten times what one of many does. So a decode step makes more rows than it needs, where
        there is room: twice as many each time, so that at most half of what is made is never used.
        """
        with self._lock:
            stock = self._stocks[matrix]
            parts = stock.withdraw(rows) if stock.rows >= rows else None
            spare = self._promise_spare(matrix, rows) if parts is None else 0
        if parts is not None:
            return stock.pad(parts)
        try:
            batch, mask = self._make(matrix, rows + spare)
            batch.used = rows
            with self._lock:
                if spare:
                    stock.put(batch)
        finally:
            with self._lock:
                stock.promised -= rows + spare if spare else 0
        return Pad(mask[:rows], batch.product[:rows])

    def _promise_spare(self, matrix: Matrix, rows: int) -> int:
        stock = self._stocks[matrix]
        room = self._most_rows - stock.nbytes // stock.row_bytes
        spare = min(self._spare[matrix], self.batch_rows, room - rows) if rows <= DECODE_ROWS else 0
        if spare < 1:
            return 0
        stock.promised += rows + spare
        self._spare[matrix] = min(2 * self._spare[matrix], MOST_ROWS)
        return spare

    def _make(self, matrix: Matrix, rows: int) -> tuple[Batch, Words]:
        """-> the batch and its r, which need not be made again where it is used at once."""
        stock = self._stocks[matrix]
        address = self._stream.take(rows * row_words(stock.width))
        product = torch.empty(rows, stock.channels, dtype=torch.int32)
        batch = Batch(self._stream, address, product.numpy())
        mask = np.ascontiguousarray(batch.words(slice(0, rows), stock.width))
        self._ring.product(torch.from_numpy(mask), self._load(matrix), product)
        return batch, mask
