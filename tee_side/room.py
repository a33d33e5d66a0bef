"""How much room tensors get on their way: lanes, slots and bytes, from the options and the model."""

from __future__ import annotations

from dataclasses import dataclass

from asynctsqp.config import EngineOptions
from asynctsqp.errors import BadInputError, PromptError
from asynctsqp.layouts import OPERATIONS, Layouts
from asynctsqp.limits import DECODE_ROWS, MOST_PORTIONS, SLOT_ALIGNMENT, SLOTS
from asynctsqp.model_spec import ModelSpec, Op
from tee_side.scheduler import Policy

# By where the products are computed. On a GPU a prompt is several chunks, of which some are computed there while others
# are here: with two lanes each waits for the other's longest step
CPU_LANES, CPU_CHUNK_TOKENS = 2, 1024
GPU_LANES, GPU_CHUNK_TOKENS = 4, 256
DECODE_LANES = 2  # at most: each more splits the same requests into more batches, and hides nothing more
SHARED_MEMORY = ("doorbell", "shm")  # transports, as records.RpcRecord names them
DEFAULT_SLOT_BYTES = 16 << 20
# A call of attention scores is one call, as in the system that these partitions stand for, up to this size.
SCORES_SLOT_BYTES = 64 << 20


@dataclass(frozen=True)
class Room:
    """Lanes in flight, calls in flight on each, the bytes that one call may have in either direction, and what a chunk
    of prompts has at most.
    """

    lanes: int
    slots: int
    slot_bytes: int
    chunk_tokens: int

    @classmethod
    def of(cls, spec: ModelSpec, layouts: Layouts, options: EngineOptions, device: str) -> Room:
        """What the options say, or else what suits the GPU side's device; slots for a chunk, up to a limit.

        Raises BadInputError for less than a row.
        """
        operations = OPERATIONS[options.partition]
        slots = 3 if Op.Q in operations else SLOTS  # q, k and v go out at once
        sends_scores = Op.QK in operations  # the ladder's first rungs: one sequence at a time is enough
        default_lanes, default_chunk = (
            (CPU_LANES, CPU_CHUNK_TOKENS) if _is_cpu(device) else (GPU_LANES, GPU_CHUNK_TOKENS)
        )
        lanes = options.lanes or (1 if sends_scores else default_lanes)
        chunk_tokens = options.chunk_tokens or default_chunk
        return cls(lanes, slots, _slot_bytes(spec, layouts, options, chunk_tokens), chunk_tokens)


def policy(options: EngineOptions, room: Room, device: str, transport: str) -> Policy:
    """How tokens are put together. device: of the GPU side; transport: the way to it.

    Where the products run on the CPU, two batches of decodes would read all weights twice, and one of more than
    DECODE_ROWS falls off the fast products. On a GPU one batch is computed there while the other is here, but two are
    twice the calls: more than a decode step's products on a near GPU give back (docs/measurements.md), and less than a
    network's way there and back. With --lanes it is as asked for.
    """
    is_cpu = _is_cpu(device)
    one_batch = is_cpu or (options.lanes is None and transport in SHARED_MEMORY)
    alone = Op.QK in OPERATIONS[options.partition]
    together = DECODE_ROWS if is_cpu else MOST_PORTIONS
    return Policy(
        chunk_tokens=room.chunk_tokens,
        most_portions=1 if alone else together,
        decode_lanes=1 if one_batch else min(DECODE_LANES, room.lanes),
    )


def check_keys(layouts: Layouts, partition: str, slot_bytes: int, keys: int) -> None:
    """Raises PromptError if attention to so many keys is asked for and one row of it does not fit a slot."""
    needed = max(
        (layouts.of(op, 1, keys).slot_bytes for op in OPERATIONS[partition] if op in (Op.QK, Op.AV)), default=0
    )
    if needed > slot_bytes:
        raise PromptError(
            f"{keys} tokens need slots of {needed} bytes in --partition {partition}: use a larger --slot-bytes, or "
            "lower --max-new-tokens"
        )


def _is_cpu(device: str) -> bool:
    return device == "cpu"


def _slot_bytes(spec: ModelSpec, layouts: Layouts, options: EngineOptions, chunk_tokens: int) -> int:
    operations = OPERATIONS[options.partition]
    row = max(layouts.of(op, 1, int(op in (Op.QK, Op.AV))).slot_bytes for op in operations)
    if options.slot_bytes is not None:
        if options.slot_bytes < row:
            raise BadInputError(f"--slot-bytes is at least {row} for this model: one row of its widest call")
        return options.slot_bytes
    tokens = min(chunk_tokens, spec.max_positions)
    in_layer = operations - {Op.LM_HEAD}  # which is seldom asked for more than a row
    keys = {op: tokens if op in (Op.QK, Op.AV) else 0 for op in in_layer}
    chunk = max(layouts.of(op, tokens, keys[op]).slot_bytes for op in in_layer)
    limit = SCORES_SLOT_BYTES if Op.QK in operations else DEFAULT_SLOT_BYTES
    return _round_up(max(row, min(limit, chunk)))


def _round_up(size: int) -> int:
    return -(-size // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
