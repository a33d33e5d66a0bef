"""What the enclave keeps of one matrix to protect its products: scales, a bias, and the secrets of its check.

Covered: all of it comes from the enclave's own reading of the checkpoint; a matrix that is read again later, for more
masks, is the one that was read first, or an error.
Not covered: a checkpoint that was wrong from the start: the enclave has nothing to compare it with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.errors import IntegrityError
from asynctsqp.integer_weights import Matrix, digest_of, read
from asynctsqp.memory import give_back
from asynctsqp.quantize import Quantized
from asynctsqp.ring import RingWeight
from tee_side.freivalds import Check
from tee_side.masking import Floats, Scale

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Guard:
    """channels: the weights' scales [N]; bias: [N] or None; check: None where answers are believed."""

    scale: Scale
    channels: Floats
    bias: Floats | None
    check: Check | None
    digest: bytes

    @classmethod
    def of(cls, weight: Quantized, digest: bytes, bias: Floats | None, checked: bool) -> Guard:
        """digest: of the weight. Raises BadInputError or CheckpointError for one that the arithmetic cannot hold."""
        norm = weight.norm()
        check = Check(weight, norm) if checked else None
        return cls(Scale(weight.shape[1], norm), weight.scales.numpy(), bias, check, digest)


def read_bias(checkpoint: Checkpoint, matrix: Matrix) -> Floats | None:
    """[N] float32, its parts one after another."""
    op, layer = matrix
    linear = checkpoint.spec.linears[op]
    if not linear.bias:
        return None
    parts = [checkpoint.read(part.format(layer=layer) + ".bias").float() for part, _ in linear.parts]
    bias: Floats = torch.cat(parts).numpy()
    return bias


class MaskWeights:
    """The integer weights that masks are made with: as many as the memory holds stay, the others are read again."""

    def __init__(self, checkpoint: Checkpoint, bits: int, memory: int) -> None:
        """memory: bytes of weights that may stay."""
        self._checkpoint = checkpoint
        self._bits = bits
        self._memory = memory
        self._kept: dict[Matrix, RingWeight] = {}
        self._digests: dict[Matrix, bytes] = {}

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self._kept.values())

    def keep(self, matrix: Matrix, weight: Quantized, digest: bytes) -> None:
        """After the first reading; digest: of that weight."""
        self._digests[matrix] = digest
        if self.nbytes + weight.digits.nbytes <= self._memory:
            self._kept[matrix] = RingWeight(weight.digits, CPU)

    def keeps(self, matrix: Matrix) -> bool:
        return matrix in self._kept

    def load(self, matrix: Matrix) -> RingWeight:
        """Any thread may. Raises IntegrityError where the file holds something else than before."""
        if matrix in self._kept:
            return self._kept[matrix]
        weight = read(self._checkpoint, matrix, self._bits, CPU)
        if digest_of(weight) != self._digests[matrix]:
            raise IntegrityError("the model's files changed while they were in use: start again with good ones")
        give_back()
        return RingWeight(weight.digits, CPU)
