"""Pads whose products a mask peer makes: asked for so far ahead that its answers are here when a call needs them.

    take()   from the stock; a call that finds too few waits for what is on its way, first come first served
    _ask     keeps some megabytes of questions in flight, at any time, since the peer does the work:
                1. what calls wait for now
                2. what a long call's next matrices will need, in the order of the layers
                3. the matrix with the fewest rows, until all of --mask-memory is used; while a request runs on few
                   cores only what a decode step must not wait for, since receiving costs the enclave's own time

Covered: pads come out of a stock as the bank's do (tee_side/stock), each once, whoever is cancelled or fails; what a
cancelled call waited for goes to the next one, unused.
Not covered: what the times of the questions tell the peer: how fast pads are used, and how long prompts are that use
up the stock.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from asynctsqp.errors import AsynctsqpError, GpuSideLost, one_line
from asynctsqp.filling import Report, silent
from asynctsqp.integer_weights import Matrix
from asynctsqp.limits import DECODE_ROWS
from asynctsqp.mask_blocks import most_rows
from asynctsqp.model_spec import Op
from tee_side.mask_peer import MaskPeer
from tee_side.masking import Pad
from tee_side.pads import cores_to_spare
from tee_side.stock import Stock, words_ahead_bytes

IN_FLIGHT_BYTES = 16 << 20  # of answers: more than a network of 10 Gbit/s holds in 10 ms
MOST_QUESTIONS = 128  # in flight, of narrow matrices: a peer refuses what comes while it has 256 of one client
LEAST_ROWS = 4  # of a matrix that must fit: less is a question for each token
MOST_ROWS = 256  # of a question: more are hardly cheaper
FIRST_ROWS = 16  # of a matrix that has none: all have a few before one has many
RUNNING_ROWS = 64  # of each matrix while a request runs on few cores: eight steps of eight sequences
MATRICES_AHEAD = 6  # of a long call: a layer and a half


@dataclass(frozen=True)
class Budget:
    """limit: bytes of u; row_bytes: of a token's way through all matrices; most_rows: tokens that are kept ready."""

    limit: int
    row_bytes: int
    most_rows: int

    @classmethod
    def of(cls, shapes: Mapping[Matrix, tuple[int, int]], memory: int) -> Budget:
        """shapes: (N, K) of every matrix; memory: bytes, of all that masks are made of."""
        limit = max(0, memory - words_ahead_bytes(shapes))
        row_bytes = sum(4 * channels for channels, _ in shapes.values())
        # three quarters are for the stock: a long call's next matrices need room when it is full
        return cls(limit, row_bytes, 3 * limit // 4 // row_bytes)


class _Shelf:
    """One matrix's stock, and who waits for it."""

    def __init__(self, channels: int, width: int, most: int) -> None:
        """most: rows that are kept."""
        self.stock = Stock(channels, width)
        self.block_rows = most_rows(channels, width)
        self.waiting: deque[tuple[int, asyncio.Future[Pad]]] = deque()
        self._most = most
        self._batch_rows = max(1, min(MOST_ROWS, most // 4, self.block_rows))

    @property
    def coming(self) -> int:
        """Rows that are here or on their way."""
        return self.stock.rows + self.stock.promised

    @property
    def missing(self) -> int:
        """Rows that calls wait for and nobody was asked for."""
        return sum(rows for rows, _ in self.waiting) - self.coming

    def room(self, busy: bool) -> int:
        """Rows that should be asked for next, to have more. busy: only if it is worth a question."""
        rows = min(self._batch_rows, max(FIRST_ROWS, self.coming))
        free = self._most - self.stock.nbytes // self.stock.row_bytes
        return rows if free >= rows else 0 if busy else free

    def serve(self) -> None:
        """Hands pads to those who wait, in their order."""
        while self.waiting and self.waiting[0][0] <= self.stock.rows:
            rows, future = self.waiting.popleft()
            if not future.done():  # it may have been cancelled
                future.set_result(self.stock.pad(self.stock.withdraw(rows)))


class PeerPads:
    """Made by a mask peer (pads.Pads). Make it in a running loop."""

    def __init__(self, peer: MaskPeer, shapes: Mapping[Matrix, tuple[int, int]], budget: Budget) -> None:
        """shapes: (N, K) of every matrix, in the order of the layers."""
        self._peer = peer
        self._budget = budget
        self._shelves = {matrix: _Shelf(*shape, budget.most_rows) for matrix, shape in shapes.items()}
        in_layers = [matrix for matrix in shapes if matrix[0] is not Op.LM_HEAD]  # seldom asked for more than a row
        self._next = dict(pairwise(in_layers))
        self._expected: dict[Matrix, int] = {}  # rows that a long call will need soon, the nearest matrix first
        self._in_flight = 0  # bytes
        self._asked = 0  # questions
        self._requests = 0
        self._beside = cores_to_spare()
        self._failure: AsynctsqpError | None = None
        self._wanted = asyncio.Event()
        self._arrived = asyncio.Event()
        self._questions: set[asyncio.Task[None]] = set()
        self._asking = asyncio.create_task(self._ask())

    @property
    def rows(self) -> int:
        """Tokens that can be served from what is there."""
        return min(shelf.stock.rows for shelf in self._shelves.values())

    @property
    def nbytes(self) -> int:
        return sum(shelf.stock.nbytes for shelf in self._shelves.values())

    async def take(self, matrix: Matrix, rows: int) -> Pad:
        """Raises GpuSideError once the peer is lost, HandshakeRefused where it came back as another."""
        self._check()
        shelf = self._shelves[matrix]
        self._expected.pop(matrix, None)
        if rows > DECODE_ROWS:
            self._expect(matrix, rows)
        if not shelf.waiting and shelf.stock.rows >= rows:
            if self._refill(shelf):
                self._wanted.set()
            return shelf.stock.pad(shelf.stock.withdraw(rows))
        pad: asyncio.Future[Pad] = asyncio.get_running_loop().create_future()
        waiter = rows, pad
        shelf.waiting.append(waiter)
        self._wanted.set()
        try:
            return await pad
        finally:
            if waiter in shelf.waiting:
                shelf.waiting.remove(waiter)
                shelf.serve()  # who came later may need fewer

    @property
    def failure(self) -> AsynctsqpError | None:
        final = self._failure is not None and not self._failure.retryable
        return self._failure if final else self._peer.failure

    async def prepare(self, tokens: int, report: Report = silent) -> int:
        wanted = min(tokens, self._budget.most_rows)
        if self.rows < wanted:
            self._check()
        while self.rows < wanted and (self._in_flight or self._choose() is not None):
            here = sum(min(shelf.stock.rows, wanted) for shelf in self._shelves.values())
            report("receiving masks", here, wanted * len(self._shelves))
            self._arrived.clear()
            self._wanted.set()
            await self._arrived.wait()
            if self._failure is not None:
                raise self._failure.again()
        return self.rows

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        self._requests += 1
        try:
            yield
        finally:
            self._requests -= 1
            self._wanted.set()

    async def close(self) -> None:
        tasks = [self._asking, *self._questions]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._peer.close()

    def _check(self) -> None:
        if failure := self.failure:
            raise failure.again()
        if self._failure is not None:
            self._failure = None  # --reconnect-s did not help then, and may now
            self._wanted.set()

    def _expect(self, matrix: Matrix, rows: int) -> None:
        for _ in range(MATRICES_AHEAD):
            if matrix not in self._next:
                return
            matrix = self._next[matrix]
            self._expected[matrix] = rows

    async def _ask(self) -> None:
        while True:
            self._wanted.clear()
            while (chosen := self._choose()) is not None:
                matrix, rows = chosen
                shelf = self._shelves[matrix]
                shelf.stock.promised += rows
                self._in_flight += rows * shelf.stock.row_bytes
                self._asked += 1
                question = asyncio.create_task(self._question(matrix, rows))
                self._questions.add(question)
                question.add_done_callback(self._questions.discard)
            await self._wanted.wait()

    def _choose(self) -> tuple[Matrix, int] | None:
        """What is to be asked for next."""
        if self._failure is not None or self._in_flight >= IN_FLIGHT_BYTES or self._asked >= MOST_QUESTIONS:
            return None
        for matrix, shelf in self._shelves.items():
            if shelf.waiting and shelf.missing > 0:
                return matrix, min(shelf.missing, shelf.block_rows)
        for matrix, rows in self._expected.items():
            shelf = self._shelves[matrix]
            missing = min(rows - shelf.coming, shelf.block_rows)
            if missing > 0 and self.nbytes + missing * shelf.stock.row_bytes <= self._budget.limit:
                return matrix, missing
        matrix, shelf = min(self._shelves.items(), key=lambda item: item[1].coming)
        rows = self._refill(shelf)
        return (matrix, rows) if rows > 0 else None

    def _refill(self, shelf: _Shelf) -> int:
        """Rows that should be asked for next, to have more of a matrix."""
        busy = self._requests > 0
        if busy and not self._beside and shelf.coming >= RUNNING_ROWS:
            return 0
        return shelf.room(busy)

    async def _question(self, matrix: Matrix, rows: int) -> None:
        shelf = self._shelves[matrix]
        try:
            batch = await self._peer.ask(matrix, rows)
        except AsynctsqpError as error:
            self._fail(error)
        except Exception as error:  # no memory, say: who waits must hear of it
            self._fail(GpuSideLost(f"the mask peer's masks cannot be used: {one_line(error)}"))
        else:
            shelf.stock.put(batch)
        finally:
            shelf.stock.promised -= rows
            self._in_flight -= rows * shelf.stock.row_bytes
            self._asked -= 1
            shelf.serve()
            self._arrived.set()
            self._wanted.set()

    def _fail(self, error: AsynctsqpError) -> None:
        """Whoever waits hears of it, and nothing more is asked for until somebody comes."""
        self._failure = error
        for shelf in self._shelves.values():
            for _, future in shelf.waiting:
                if not future.done():
                    future.set_exception(error.again())
            shelf.waiting.clear()
