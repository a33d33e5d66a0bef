"""`python -m tee_side.enclave_size --model MODEL ...`: how large an enclave the TEE side needs, line by line.

Takes the TEE side's own options. What libraries and tokenizer take is measured, in this very process; the rest is
arithmetic over the model's shapes. Memory that both sides share lies outside the enclave and does not count.

Without EDMM the whole size is committed when the enclave starts; with it the size is a limit. The hardware takes powers
of two only (SECS.SIZE, Intel SDM volume 3D), so the manifest's value is the next one.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.config import MODEL_HELP, EngineOptions, OneLineParser, add_arguments, from_arguments
from asynctsqp.ending import ended
from asynctsqp.integer_weights import matrices
from asynctsqp.layouts import Layouts
from asynctsqp.limits import HELPER_THREADS, WEIGHT_DIGITS
from asynctsqp.model_spec import ModelSpec, Op
from asynctsqp.quantize import BLOCK
from asynctsqp.tensor_codec import wire_dtype
from tee_side.freivalds import COLUMNS
from tee_side.room import SHARED_MEMORY, Room, policy
from tee_side.rounded_attention import SCORES
from tee_side.row_threads import PIECE
from tee_side.tokenizer import Tokenizer

MIB = 1 << 20
KV_MEMORY, MASK_MEMORY, THREADS = 256 * MIB, 256 * MIB, 2  # unless the options say otherwise
STACK = 2 * MIB  # sys.stack.size of the manifest
GRAMINE = 64 * MIB  # the library OS and its own heap
MARGIN = 0.1  # of what an allocator holds: it gives back what is free after each matrix that is read
GRAMINE_THREADS = 3  # inter-process, async, TLS handshakes
ZEROMQ_THREADS = 2 * 2  # I/O and reaper; twice while a connection is replaced
DOUBLE, WORD = 8, 4  # bytes
LIBRARIES = ("asynctsqp.command", "asynctsqp.service.server")


@dataclass(frozen=True)
class Line:
    """One addend. size: bytes; exact: gets no margin."""

    name: str
    size: int
    arithmetic: str
    exact: bool = False


@dataclass(frozen=True)
class Size:
    """What an enclave needs."""

    lines: tuple[Line, ...]
    threads: tuple[tuple[str, int], ...]
    outside: int  # bytes of shared memory

    @property
    def needed(self) -> int:
        """Bytes, with the margin for what an allocator wastes."""
        return int(sum(line.size * (1 if line.exact else 1 + MARGIN) for line in self.lines))

    @property
    def enclave_size(self) -> int:
        """The next power of two: the manifest's."""
        return 1 << (self.needed - 1).bit_length()

    @property
    def max_threads(self) -> int:
        return sum(count for _, count in self.threads)

    @classmethod
    def of(cls, checkpoint: Checkpoint, options: EngineOptions) -> Size:
        """Imports what the TEE side imports, to measure it. Raises BadInputError for options that make no sense."""
        spec = checkpoint.spec
        # chunks are longer where the GPU side is on a CPU; lanes, and requests in a batch, are more where it is not
        in_flight = (_in_flight(spec, options, device) for device in ("cpu", "cuda"))
        working, slots = (max(lines, key=lambda line: line.size) for lines in zip(*in_flight, strict=True))
        messages = options.transport in ("binary", "msgpack")
        threads = tuple(_threads(options))
        lines = (
            *_measured(checkpoint),
            *_of_weights(checkpoint, options),
            Line("keys and values", options.kv_memory or KV_MEMORY, "--kv-memory"),
            working,
            slots if messages else Line(slots.name, 0, f"{slots.arithmetic}, outside: shared"),
            Line(
                "thread stacks",
                STACK * sum(n for _, n in threads),
                f"{sum(n for _, n in threads)} x {_mib(STACK)}",
                True,
            ),
            Line("Gramine itself", GRAMINE, "library OS and its heap", exact=True),
        )
        return cls(lines, threads, 0 if messages else slots.size)


def main() -> int:
    return ended("tee_side.enclave_size", _show, "cannot write the table")


def _show() -> None:
    arguments = _parser().parse_args()
    options = from_arguments(EngineOptions, arguments)
    size = Size.of(Checkpoint.find(arguments.model), options)
    print(_json(size) if arguments.json else _table(size))


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="tee_side.enclave_size",
        description="How large an enclave the TEE side needs. Where an option does not say otherwise: "
        f"--kv-memory {KV_MEMORY // MIB}M, --mask-memory {MASK_MEMORY // MIB}M, --threads {THREADS}.",
    )
    parser.add_argument("--model", required=True, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    add_arguments(parser, EngineOptions)
    return parser


def _measured(checkpoint: Checkpoint) -> Iterator[Line]:
    """Interpreter, libraries and tokenizer, by the operating system's account."""
    for name in LIBRARIES:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:  # the HTTP service is an extra
            continue
    before = _status("RssAnon")
    tokenizer = Tokenizer(checkpoint.directory, checkpoint.spec.vocab_size)
    tokenizer.encode("a")
    after = _status("RssAnon")
    yield Line("interpreter and libraries", before, "measured: private memory after the imports")
    yield Line(
        "their files, mapped whole", _mapped_files(), "measured: an enclave copies every mapped byte inside", exact=True
    )
    yield Line("tokenizer", max(after - before, 0), "measured")


def _of_weights(checkpoint: Checkpoint, options: EngineOptions) -> Iterator[Line]:
    spec = checkpoint.spec
    embedding = checkpoint.tensors["model.embed_tokens.weight"].size
    norms = (2 * spec.layers + 1) * spec.hidden_size
    yield Line("embedding", embedding, f"{spec.vocab_size} x {spec.hidden_size} in the file's dtype")
    yield Line("norms", norms * WORD, f"{norms} x {WORD}")
    if options.protect == "none":
        return
    shapes = [(spec.linears[op].out_features, spec.linears[op].in_features) for op, _ in matrices(spec)]
    features = sum(n + k for n, k in shapes)
    scales = sum(n for n, _ in shapes) * WORD
    checks = COLUMNS * DOUBLE * features if options.protect in ("verify", "full") else 0
    yield Line("checks: S and T, and scales", checks + scales, f"{COLUMNS} x {DOUBLE} x {features} + {scales}")
    if options.protect in ("mask", "full"):
        yield Line("masks and their weights", options.mask_memory or MASK_MEMORY, "--mask-memory")
    yield _reading(checkpoint, options, max(n * k for n, k in shapes))


def _reading(checkpoint: Checkpoint, options: EngineOptions, largest: int) -> Line:
    """One matrix while it is read and quantized: the file's bytes, its digits, and two float32 blocks of it."""
    itemsize = max(entry.dtype.itemsize for entry in checkpoint.tensors.values())
    each = itemsize + WEIGHT_DIGITS[options.weight_bits]
    blocks = 2 * WORD * min(BLOCK, largest)
    return Line("a matrix being read", largest * each + blocks, f"{largest} x {each} + {blocks} of blocks")


def _in_flight(spec: ModelSpec, options: EngineOptions, device: str) -> tuple[Line, Line]:
    """What calls take on their way, and their slots. device: the GPU side's."""
    bits = 0 if options.protect == "none" else options.weight_bits
    room = Room.of(spec, Layouts(spec, wire_dtype(options.dtype, bits)), options, device)
    scored = policy(options, room, device, SHARED_MEMORY[0]).most_portions
    slots = f"2 x {room.lanes} lanes x {room.slots} x {room.slot_bytes}"
    return (
        _working(spec, options, room, scored),
        Line("slots", 2 * room.lanes * room.slots * room.slot_bytes, slots),
    )


def _working(spec: ModelSpec, options: EngineOptions, room: Room, scored: int) -> Line:
    """A chunk on each lane: x in float32 and float64, as words, its mask; y as words, the mask's product, in float32.

    scored: rows of a chunk that have scores, one of each request. What is checked is in float64, some rows on each
    thread. Attention in bfloat16 (rounded_attention.py), one at a time, has its own scores, and the keys and values so
    far.
    """
    rows = min(room.chunk_tokens, spec.max_positions)
    x_bytes, y_bytes = 3 * WORD + DOUBLE, 3 * WORD
    of_row = {op: x_bytes * linear.in_features + y_bytes * linear.out_features for op, linear in spec.linears.items()}
    scores = of_row.pop(Op.LM_HEAD) + DOUBLE * spec.vocab_size
    widest = max(of_row.values()) + y_bytes * spec.hidden_size
    checked = DOUBLE * max(linear.out_features for op, linear in spec.linears.items() if op != Op.LM_HEAD)
    pieces = PIECE * (options.threads or THREADS)
    rounded = options.dtype == "bfloat16" and options.protect == "none"
    attended = 2 * (SCORES + 2 * spec.kv_heads * spec.head_dim * spec.max_positions) if rounded else 0
    size = room.lanes * (rows * widest + scored * scores) + pieces * checked + attended
    return Line(
        "working memory",
        size,
        f"{room.lanes} lanes x ({rows} x {widest} + {scored} x {scores}) + {pieces} x {checked} + {attended}",
    )


def _threads(options: EngineOptions) -> Iterator[tuple[str, int]]:
    """OpenMP makes a team for each thread that computes: the event loop, the masks, and a helper while it loads."""
    threads = options.threads or THREADS
    yield "main, with the HTTP service", 1
    yield "event loop", 1
    yield "helpers of the event loops", 2 * HELPER_THREADS
    yield "ZeroMQ", ZEROMQ_THREADS
    yield "masks", int(options.protect in ("mask", "full"))
    yield "rows of long blocks", 0 if options.protect == "none" else threads - 1
    yield f"OpenMP, 3 teams of {threads}", 3 * (threads - 1)
    yield "Gramine", GRAMINE_THREADS


def _status(name: str) -> int:
    """Bytes, of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) << 10
    return 0


def _mapped_files() -> int:
    """Bytes of files that are mapped here, whether or not they are resident."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(None, 5)
        if len(fields) == 6 and fields[5].startswith("/"):
            start, end = (int(word, 16) for word in fields[0].split("-"))
            total += end - start
    return total


def _mib(size: int) -> str:
    return f"{size / MIB:,.1f} MiB"


def _table(size: Size) -> str:
    rows = [f"{line.name:<28}{_mib(line.size):>14}   {line.arithmetic}" for line in size.lines]
    total = sum(line.size for line in size.lines)
    return "\n".join(
        [
            *rows,
            f"{'sum':<28}{_mib(total):>14}",
            f"{'needed':<28}{_mib(size.needed):>14}   {MARGIN:.0%} on all but files, stacks and Gramine",
            f"{'sgx.enclave_size':<28}{_mib(size.enclave_size):>14}   the next power of two, as the hardware demands;",
            f"{'':<45}committed at the start without EDMM, a limit with it",
            f"{'shared memory, outside':<28}{_mib(size.outside):>14}",
            "",
            *(f"{name:<38}{count:>4}" for name, count in size.threads),
            f"{'sgx.max_threads':<38}{size.max_threads:>4}",
        ]
    )


def _json(size: Size) -> str:
    return json.dumps(
        {
            "lines": {line.name: line.size for line in size.lines},
            "needed": size.needed,
            "enclave_size": f"{size.enclave_size // MIB}M",
            "max_threads": size.max_threads,
            "stack_size": f"{STACK // MIB}M",
            "shared_memory": size.outside,
        }
    )


if __name__ == "__main__":
    sys.exit(main())
