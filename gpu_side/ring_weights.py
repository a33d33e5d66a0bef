"""Integer weights, and their exact products mod 2^32, for TEE sides that mask or check what they send."""

from __future__ import annotations

from functools import partial

import torch

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.integer_weights import digest_of, fingerprint, matrices, read
from asynctsqp.limits import WEIGHT_DIGITS
from asynctsqp.model_spec import Op
from asynctsqp.ring import Ring, RingWeight
from gpu_side import memory
from gpu_side.executor import Program, Tensors
from gpu_side.weights import finish_copies


class RingWeights:
    """Everything of one checkpoint with weights of 8 or 12 bits on one device. fingerprint: of all of them."""

    def __init__(self, checkpoint: Checkpoint, bits: int, device: torch.device) -> None:
        """Reads and quantizes all linears. Raises BadInputError before that where they do not fit."""
        digits = WEIGHT_DIGITS[bits]
        memory.check(checkpoint, digits * memory.linear_parameters(checkpoint.spec), torch.int8, device)
        self._weights: dict[tuple[Op, int], RingWeight] = {}
        digests = []
        for matrix in matrices(checkpoint.spec):
            weight = read(checkpoint, matrix, bits, device)
            digests.append(digest_of(weight))
            self._weights[matrix] = RingWeight(weight.digits, device)
        finish_copies(device)
        self.fingerprint = fingerprint(digests)
        shapes = [(weight.rows, weight.width) for weight in self._weights.values()]
        self._ring = Ring(device, shapes, digits)

    def of(self, op: Op, layer: int) -> Program:
        """op: a linear; layer: one that the model has."""
        return partial(_product, self._ring, self._weights[op, layer])


def _product(ring: Ring, weight: RingWeight, inputs: Tensors, outputs: Tensors) -> None:
    ring.product(inputs[0], weight, outputs[0])
