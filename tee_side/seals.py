"""What happens to the arrays of one block of a call before they leave the enclave, and after they came back.

sealed = await sealer.seal(...)      sealed.inputs leave
sealed.sent()                        while the other side computes
                                     what it answers is copied into sealed.room
sealed.open()                        the outputs are there, or the answer was wrong
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from asynctsqp.errors import AsynctsqpError
from asynctsqp.filling import Report, silent
from asynctsqp.model_spec import Op
from tee_side.arrays import Array, Rows

Arrays = tuple[Array, ...]
Outputs = tuple[Rows, ...]


class Sealed(Protocol):
    """One block. It is used once: whoever asks again seals again."""

    @property
    def inputs(self) -> Arrays:
        """What leaves."""

    @property
    def room(self) -> Arrays:
        """What the answer is copied to."""

    def sent(self) -> None:
        """Does what can be done without the answer."""

    def open(self) -> None:
        """Fills the outputs. Raises IntegrityError for a wrong answer."""


class Sealer(Protocol):
    """One level of protection."""

    weight_bits: int  # of the products; 0 where they are of floating-point numbers
    weights: bytes  # the fingerprint of those weights

    @property
    def failure(self) -> AsynctsqpError | None:
        """What every call fails with from now on."""

    async def seal(self, op: Op, layer: int, inputs: Arrays, outputs: Outputs) -> Sealed:
        """outputs: room for the answer, [rows, features] float32 each."""

    def working(self) -> AbstractContextManager[None]:
        """While a request is running: what can wait, waits."""

    async def prepare(self, tokens: int, report: Report = silent) -> int:
        """Makes masks for so many tokens ahead, or for as many as fit; returns for how many there are."""

    async def close(self) -> None:
        """Ends what it does in the background."""


class Clear:
    """No protection: everything leaves as it is, and every answer is believed."""

    weight_bits = 0
    weights = b""
    failure: AsynctsqpError | None = None

    async def seal(self, op: Op, layer: int, inputs: Arrays, outputs: Outputs) -> Sealed:
        return _ClearBlock(inputs, outputs)

    def working(self) -> AbstractContextManager[None]:
        return nullcontext()

    async def prepare(self, tokens: int, report: Report = silent) -> int:
        return 0

    async def close(self) -> None:
        pass


class _ClearBlock:
    __slots__ = ("inputs", "room")

    def __init__(self, inputs: Arrays, outputs: Outputs) -> None:
        self.inputs = inputs
        self.room: Arrays = outputs

    def sent(self) -> None:
        pass

    def open(self) -> None:
        pass
