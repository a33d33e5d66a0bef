"""The linears of one model, masked or checked or both, whatever the transport: what `--protect` is.

For each block of a call, with W the integer weights (tee_side/masking, tee_side/freivalds have the arithmetic):

    seal    x_q = round(x / s_x)   m = x_q + r          m leaves; without masks, x_q does
    sent    e = x_q T                                   while the other side computes
    open    y = y' - u             y S = e ?            y s_x s_w + bias goes on, or nothing does

Covered: with masks, what leaves is uniform; with checks, no value of a wrong answer is seen by anything but the check
itself. After one wrong answer every further call fails: the other side has learnt that a check failed, and gets no
second try against the same secrets. A block that is made again, on a new connection, has a new pad.
Not covered: the number, shapes and times of the calls. Without checks, a lie changes the text, and what the text does
to lengths and times may tell something about it. docs/threat-model.md has the whole list.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import numpy as np

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.config import EngineOptions
from asynctsqp.errors import AsynctsqpError, BadInputError, IntegrityError
from asynctsqp.filling import Report, silent
from asynctsqp.integer_weights import Matrix, digest_of, fingerprint, matrices, read
from asynctsqp.key_stream import KeyStream, Words
from asynctsqp.limits import WEIGHT_DIGITS
from asynctsqp.memory import gib, give_back, host_bytes
from asynctsqp.model_spec import ModelSpec, Op
from asynctsqp.ring import Ring
from asynctsqp.target import Target
from tee_side.arrays import Rows
from tee_side.bank import Bank
from tee_side.guard import CPU, Guard, MaskWeights, read_bias
from tee_side.mask_peer import Identity, MaskPeer, reach
from tee_side.masking import Doubles, Pad, dequantize
from tee_side.pads import BankPads, Pads
from tee_side.peer_pads import LEAST_ROWS, Budget, PeerPads
from tee_side.row_threads import PIECE, RowThreads
from tee_side.seals import Arrays, Clear, Outputs, Sealed, Sealer

MOST_MASK_MEMORY = 1 << 30  # unless it is said; or an eighth of the machine's, if that is less

CAUGHT_EITHER = "a wrong answer of the GPU side or the mask peer was caught: use neither of them any more"

CHECKED = ("verify", "full")
MASKED = ("mask", "full")


async def sealer_for(checkpoint: Checkpoint, options: EngineOptions, threads: int, report: Report = silent) -> Sealer:
    """What the options ask for. Reads all weights where that is more than nothing: seconds to minutes.

    Raises BadInputError for a model or a --mask-memory that it cannot be done with, GpuSideError for a mask peer that
    is not there.
    """
    if options.protect == "none":
        return Clear()
    if options.mask_peer is not None and options.mask_peer_key is not None:
        target = Target.mask_peer(options.mask_peer, options.mask_peer_key)
        return await _with_peer(checkpoint, options, target, threads, report)
    bits, memory = options.weight_bits, _mask_memory(options)
    weights = MaskWeights(checkpoint, bits, memory // 2) if options.protect in MASKED else None
    guards = await asyncio.to_thread(_guards, checkpoint, options, weights, report)
    if weights is None:
        return Shield(guards, None, bits, threads)
    bank = await asyncio.to_thread(_bank, checkpoint.spec, weights, bits, memory)
    return Shield(guards, BankPads(bank, threads), bits, threads)


async def _with_peer(
    checkpoint: Checkpoint, options: EngineOptions, target: Target, threads: int, report: Report
) -> Shield:
    shapes, memory = _shapes(checkpoint.spec), _mask_memory(options)
    budget = Budget.of(shapes, memory)
    if budget.most_rows < LEAST_ROWS:
        raise _too_little(memory, budget.row_bytes)
    await reach(target, options.reconnect_s)
    guards = await asyncio.to_thread(_guards, checkpoint, options, None, report)
    weights = fingerprint(guard.digest for guard in guards.values())
    identity = Identity(checkpoint.fingerprint(), options.weight_bits, weights)
    peer = await MaskPeer.open(target, identity, shapes, options.reconnect_s)
    return Shield(guards, PeerPads(peer, shapes, budget), options.weight_bits, threads, CAUGHT_EITHER)


class Shield:
    """All guards of one model, and its pads (seals.Sealer)."""

    def __init__(
        self,
        guards: Mapping[Matrix, Guard],
        pads: Pads | None,
        weight_bits: int,
        threads: int,
        caught: str | None = None,
    ) -> None:
        """pads: None sends integers as they are; threads: for long blocks; caught: what a wrong answer is told as, if
        not as the GPU side's.
        """
        self.weight_bits = weight_bits
        self.weights = fingerprint(guard.digest for guard in guards.values())
        self._guards = guards
        self._pads = pads
        self._caught = caught
        self.rows = RowThreads(threads)
        self._wrong: IntegrityError | None = None  # answer, once one has been caught

    @property
    def failure(self) -> AsynctsqpError | None:
        return self._wrong or (None if self._pads is None else self._pads.failure)

    async def seal(self, op: Op, layer: int, inputs: Arrays, outputs: Outputs) -> Sealed:
        """Raises IntegrityError where a row is not finite, or once a wrong answer has been caught."""
        self.check()
        guard = self._guards[op, layer]
        x, scales = self._quantize(guard, cast(Rows, inputs[0]))
        pad = None if self._pads is None else await self._pads.take((op, layer), len(x))
        return _Block(self, guard, pad, x, scales, outputs[0])

    def working(self) -> AbstractContextManager[None]:
        return nullcontext() if self._pads is None else self._pads.working()

    async def prepare(self, tokens: int, report: Report = silent) -> int:
        return 0 if self._pads is None else await self._pads.prepare(tokens, report)

    async def close(self) -> None:
        if self._pads is not None:
            await self._pads.close()
        self.rows.close()

    def check(self) -> None:
        """Raises IntegrityError once a wrong answer has been caught."""
        if self._wrong is not None:
            raise self._wrong.again()

    def _quantize(self, guard: Guard, x: Rows) -> tuple[Doubles, Doubles]:
        if len(x) <= PIECE:
            return guard.scale.quantize(x)
        whole, scales = np.empty(x.shape), np.empty((len(x), 1))

        def some(rows: slice) -> None:
            whole[rows], scales[rows] = guard.scale.quantize(x[rows])

        self.rows.each(len(x), some)
        return whole, scales

    def distrust(self, error: IntegrityError) -> IntegrityError:
        """From now on. -> what to raise."""
        caught = error if self._caught is None else IntegrityError(self._caught)
        self._wrong = caught.again()  # one that is never raised keeps nobody's frames alive
        return caught


class _Block:
    """One block of a call (seals.Sealed)."""

    __slots__ = ("_expected", "_guard", "_out", "_pad", "_scales", "_shield", "_x", "_y", "inputs")

    def __init__(self, shield: Shield, guard: Guard, pad: Pad | None, x: Doubles, scales: Doubles, out: Rows) -> None:
        self._shield = shield
        self._guard = guard
        self._pad = pad
        self._x = x
        self._scales = scales
        self._out = out
        sent: Words
        if pad is None:
            sent = x.astype(np.int32)
        else:
            sent = np.empty(x.shape, np.int32)
            pad.mask(x, sent)
        self.inputs: tuple[Words] = (sent,)
        self._y: Words = np.empty(out.shape, np.int32)

    @property
    def room(self) -> tuple[Words]:
        return (self._y,)

    def sent(self) -> None:
        if self._guard.check is not None:
            self._expected: Doubles = self._guard.check.expect(self._x)

    def open(self) -> None:
        self._shield.check()  # another lane's answer may have been wrong: no bit more about the secrets
        y = self._y if self._pad is None else self._pad.unmask(self._y)
        self._verify(y)
        guard, scales, out = self._guard, self._scales, self._out
        self._shield.rows.each(
            len(y), lambda rows: dequantize(y[rows], scales[rows], guard.channels, guard.bias, out[rows])
        )

    def _verify(self, y: Words) -> None:
        """All of it, before any of it is used."""
        check = self._guard.check
        if check is None:
            return
        try:
            self._shield.rows.each(len(y), lambda rows: check.verify(y[rows], self._expected[rows]))
        except IntegrityError as error:
            raise self._shield.distrust(error) from None


def _guards(
    checkpoint: Checkpoint, options: EngineOptions, weights: MaskWeights | None, report: Report
) -> dict[Matrix, Guard]:
    """weights: take what they keep."""
    guards = {}
    wanted = matrices(checkpoint.spec)
    for number, matrix in enumerate(wanted):
        report("reading weights", number, len(wanted))
        weight = read(checkpoint, matrix, options.weight_bits, CPU)
        digest = digest_of(weight)
        guards[matrix] = Guard.of(weight, digest, read_bias(checkpoint, matrix), options.protect in CHECKED)
        if weights is not None:
            weights.keep(matrix, weight, digest)
        give_back()
    report("reading weights", len(wanted), len(wanted))
    return guards


def _bank(spec: ModelSpec, weights: MaskWeights, bits: int, memory: int) -> Bank:
    shapes = _shapes(spec)
    ring = Ring(CPU, shapes.values(), digits=WEIGHT_DIGITS[bits])
    give_back()
    bank = Bank(shapes, weights.load, ring, KeyStream(), memory - weights.nbytes)
    if bank.batch_rows < 1:
        raise _too_little(memory, bank.row_bytes)
    return bank


def _shapes(spec: ModelSpec) -> dict[Matrix, tuple[int, int]]:
    """(N, K) of every matrix, in the order of the layers."""
    return {(op, layer): (spec.linears[op].out_features, spec.linears[op].in_features) for op, layer in matrices(spec)}


def _too_little(memory: int, row_bytes: int) -> BadInputError:
    return BadInputError(f"--mask-memory {gib(memory)} is too little: masks of one token take {gib(row_bytes)}")


def _mask_memory(options: EngineOptions) -> int:
    return options.mask_memory or min(MOST_MASK_MEMORY, host_bytes() // 8)
