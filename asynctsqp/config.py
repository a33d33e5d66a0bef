"""The options of the commands and of the engine: one table, from which argparse, the Python API and the
`config` entry of --json are all made.

Each option is a dataclass field.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from asynctsqp.enclave_mode import check_options
from asynctsqp.endpoints import check_peer
from asynctsqp.errors import BadInputError
from asynctsqp.limits import (
    MAX_FRAME_BYTES,
    MAX_LANES,
    MAX_THREADS,
    SLOT_ALIGNMENT,
    WEIGHT_DIGITS,
    WIRE_DTYPE_NAMES,
)

MESSAGES = ("binary", "msgpack")  # transports off shared memory
MODEL_HELP = "a directory, a hub id, or as random:llama-3.1-8b: random weights in the shapes of a known model"
SIZE = re.compile(r"(\d+)\s*([KMGT]?)i?B?", re.IGNORECASE)
PUBLIC_KEY = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")  # ZeroMQ's Z85 of 32 bytes
LEAST_BITS = 8  # of integer weights
Options = TypeVar("Options")


def parse_size(text: str | int) -> int:
    """'512M' -> bytes, in powers of 1024."""
    match = SIZE.fullmatch(str(text).strip())
    if not match:
        raise BadInputError(f"{text!r} is not a size: write bytes, or a number with K, M, G or T")
    return int(match[1]) << (10 * " KMGT".index(match[2].upper() or " "))


def option(default: Any, help: str, **details: Any) -> Any:
    """A field with what argparse needs: type, choices, metavar."""
    return dataclasses.field(default=default, metadata={"help": help, **details})


def _size(help: str, **details: Any) -> Any:
    return option(None, help, type=parse_size, metavar="SIZE", **details)


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How an engine runs. Raises BadInputError for a value that makes no sense."""

    dtype: str = option(
        "float32",
        "of the products and of tensors between the sides",
        choices=WIRE_DTYPE_NAMES,
    )
    partition: str = option(
        "shielded",
        "what leaves the enclave",
        choices=("per-op", "batched", "shielded", "fused", "fused-layer"),
    )
    transport: str = option(
        "auto",
        "how tensors travel; auto is shared memory where both sides see it",
        choices=("auto", "shm", "binary", "msgpack"),
    )
    compress: str = option("none", "tensors above 1 MiB that travel as messages", choices=("none", "lz4", "zstd"))
    protect: str = option(
        "none",
        "masks and checks on what the GPU side sees and answers",
        choices=("none", "mask", "verify", "full"),
    )
    weight_bits: int = option(LEAST_BITS, "of the weights under --protect", type=int, choices=tuple(WEIGHT_DIGITS))
    mask_memory: int | None = _size("for masks made ahead, and their weights (default: up to 1G)")
    mask_peer: str | None = option(
        None, "somebody else's GPU side that makes masks; see docs/mask-peer.md", metavar="ENDPOINT"
    )
    mask_peer_key: str | None = option(None, "what the mask peer printed as mask-peer-key", metavar="KEY")
    lanes: int | None = option(None, "micro-batches in flight (default: chosen)", type=int, metavar="N")
    chunk_tokens: int | None = option(
        None,
        "tokens of a prompt that go through the layers together (default: chosen)",
        type=int,
        metavar="N",
    )
    slot_bytes: int | None = _size(
        "of each slot, two or three a lane and direction (default: what a chunk needs, up to 16M)"
    )
    kv_memory: int | None = _size("for keys and values of all sequences (default: a quarter of the memory there is)")
    doorbell: str = option("auto", "poll shared memory instead of a socket", choices=("auto", "on", "off"))
    reconnect_s: float = option(0.0, "how long to try to reach a lost GPU side again", type=float, metavar="N")
    loop: str = option("uvloop", "event loop of the engine and of its service", choices=("uvloop", "asyncio"))
    threads: int | None = option(None, "for this side's tensor work (default: chosen)", type=int, metavar="N")
    shm_name: str | None = option(None, "name of the shared-memory region (default: random)", metavar="NAME")
    enclave: bool = option(False, "refuse what an enclave must not do (implied inside one)")
    enclave_unprotected_activations: bool = option(
        False, "with --enclave: show the host activations, from which it can recover prompts"
    )
    stats: bool = option(False, "report where the time went")
    log_rpc: str | None = option(None, "one JSON line for each call; see python -m asynctsqp.report", metavar="FILE")
    trace: str | None = option(None, "a timeline for Perfetto or chrome://tracing", metavar="FILE")

    def __post_init__(self) -> None:
        _parse_sizes(self)
        check_types(self)
        check_choices(self)
        _check_combinations(self)
        _check_mask_peer(self)
        check_at_least(self, 1, "lanes", "chunk_tokens", "threads", "slot_bytes", "kv_memory", "mask_memory")
        check_at_least(self, 0, "reconnect_s")
        if self.enclave:
            check_options(self)
        elif self.enclave_unprotected_activations:
            raise BadInputError("--enclave-unprotected-activations is for --enclave: nothing is refused without it")
        if self.lanes and self.lanes > MAX_LANES:
            raise BadInputError(f"--lanes is at most {MAX_LANES}")
        if self.threads and self.threads > MAX_THREADS:
            raise BadInputError(f"--threads is at most {MAX_THREADS}")
        if self.slot_bytes and self.slot_bytes % SLOT_ALIGNMENT:
            raise BadInputError(f"--slot-bytes must be a multiple of {SLOT_ALIGNMENT}")
        if self.slot_bytes and self.transport in MESSAGES and self.slot_bytes > MAX_FRAME_BYTES:
            raise BadInputError(f"--slot-bytes is at most {MAX_FRAME_BYTES >> 20}M where tensors travel as messages")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How one answer is made. None: what the checkpoint's generation config says, else off."""

    max_new_tokens: int = option(256, "at most, and at most what the context holds", type=int, metavar="N")
    temperature: float | None = option(
        None,
        "0 is greedy (default: the checkpoint's generation config, else greedy)",
        type=float,
        metavar="T",
    )
    top_p: float | None = option(None, "smallest set of tokens with this probability", type=float, metavar="P")
    top_k: int | None = option(None, "only the K likeliest tokens; 0 is all", type=int, metavar="K")
    seed: int | None = option(None, "of the sampler (default: from the operating system)", type=int, metavar="S")
    stop: tuple[str, ...] = option((), "end before this text; may be given again", action="append", metavar="TEXT")
    ignore_eos: bool = option(False, "never sample an end-of-sequence token")

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        check_types(self)
        if not all(isinstance(text, str) and text for text in self.stop):
            raise BadInputError("--stop takes text that is not empty")
        check_at_least(self, 1, "max_new_tokens")
        check_at_least(self, 0, "temperature", "top_k")
        if self.seed is not None and not 0 <= _number("seed", self.seed) < 1 << 63:
            raise BadInputError("--seed is from 0 to 2^63 - 1")
        if self.top_p is not None and not 0 < _number("top_p", self.top_p) <= 1:
            raise BadInputError("--top-p is above 0 and at most 1")


def make(options_class: type[Options], values: dict[str, Any]) -> Options:
    """The options from keyword arguments. Raises BadInputError for a name that does not exist."""
    names = {field.name for field in dataclasses.fields(options_class)}  # type: ignore[arg-type]
    for name in values:
        if name not in names:
            raise BadInputError(f"there is no option {name!r}; there are: {', '.join(sorted(names))}")
    return options_class(**values)


def add_arguments(parser: argparse.ArgumentParser, options_class: type) -> None:
    """One flag for each field of an options class."""
    group = parser.add_argument_group(options_class.__name__.removesuffix("Options").lower() + " options")
    for field in dataclasses.fields(options_class):
        details = dict(field.metadata)
        if field.type == "bool":
            details["action"] = "store_true"
        default = None if details.get("action") == "append" else field.default
        if default is not None and default is not False and "default" not in details["help"]:
            shown = f"{default:g}" if isinstance(default, float) else default
            details["help"] += f" (default: {shown})"
        group.add_argument(_flag(field.name), default=default, **details)


def from_arguments(options_class: type[Options], arguments: argparse.Namespace) -> Options:
    """The options out of what argparse parsed."""
    values = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(options_class)}  # type: ignore[arg-type]
    for field in dataclasses.fields(options_class):  # type: ignore[arg-type]
        if field.metadata.get("action") == "append":
            values[field.name] = tuple(values[field.name] or ())
    return options_class(**values)


class OneLineParser(argparse.ArgumentParser):
    """argparse, with errors as this project writes them: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_choices(options: Any) -> None:
    """Raises BadInputError for a value that is none of its field's choices."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        choices = field.metadata.get("choices")
        if choices and value not in choices:
            raise BadInputError(f"{_flag(field.name)} is one of {', '.join(map(str, choices))}, not {value!r}")


def _check_combinations(options: EngineOptions) -> None:
    """Values that are good by themselves and not together."""
    if options.protect != "none" and options.partition != "shielded":
        raise BadInputError(
            f"--protect {options.protect} works with --partition shielded: {options.partition} shows the GPU side "
            "more than linears, which is all that can be masked"
        )
    if options.weight_bits != LEAST_BITS and options.protect == "none":
        raise BadInputError("--weight-bits is for --protect mask, verify or full: without them weights are --dtype")
    if options.mask_memory is not None and options.protect not in ("mask", "full"):
        raise BadInputError(f"--mask-memory is for --protect mask or full: {options.protect} makes no masks")
    if options.compress != "none" and options.transport == "shm":
        raise BadInputError(
            f"--compress {options.compress} cannot help --transport shm: nothing is copied to a network there"
        )
    if options.compress != "none" and options.protect in ("mask", "full"):
        raise BadInputError(
            f"--compress {options.compress} cannot help --protect {options.protect}: masked tensors are uniformly "
            "random, which no compression makes smaller"
        )
    if options.shm_name and options.transport in MESSAGES:
        raise BadInputError(f"--shm-name names shared memory, which --transport {options.transport} does not use")
    if options.doorbell == "on" and options.transport in MESSAGES:
        raise BadInputError(f"--doorbell on needs shared memory, which --transport {options.transport} does not use")


def _check_mask_peer(options: EngineOptions) -> None:
    if options.mask_peer is None and options.mask_peer_key is None:
        return
    if options.mask_peer is None or options.mask_peer_key is None:
        raise BadInputError("--mask-peer and --mask-peer-key go together: the key is what the mask peer prints")
    if options.protect not in ("mask", "full"):
        raise BadInputError(f"--mask-peer is for --protect mask or full: {options.protect} needs no masks")
    check_peer(options.mask_peer)
    if not PUBLIC_KEY.fullmatch(options.mask_peer_key):
        raise BadInputError("--mask-peer-key is 40 characters, as the mask peer printed them: put them in quotes")


def _parse_sizes(options: Any) -> None:
    for field in dataclasses.fields(options):
        if field.metadata.get("type") is parse_size and getattr(options, field.name) is not None:
            object.__setattr__(options, field.name, parse_size(getattr(options, field.name)))


def check_types(options: Any) -> None:
    """The annotations, held to at run time: options come from people."""
    for field in dataclasses.fields(options):
        value, allowed = getattr(options, field.name), str(field.type).split(" | ")
        names = {"NoneType": "None", "list": "tuple"}
        kind = names.get(type(value).__name__, type(value).__name__)
        kinds = {name.partition("[")[0] for name in allowed}
        if kind not in kinds and not (kind == "int" and "float" in kinds):
            raise BadInputError(f"{_flag(field.name)} takes {' or '.join(sorted(kinds - {'None'}))}, not {value!r}")


def check_at_least(options: Any, least: int, *names: str) -> None:
    """Raises BadInputError for a number that is less; None is none."""
    for name in names:
        value = getattr(options, name)
        if value is not None and _number(name, value) < least:
            raise BadInputError(f"{_flag(name)} is at least {least}")


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadInputError(f"{_flag(name)} takes a number, not {value!r}")
    return value
