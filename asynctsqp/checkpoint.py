"""Reading a LLaMA checkpoint: the safetensors headers once, then exactly the byte ranges asked for.

Nothing is memory-mapped: an enclave would copy every mapped byte inside, and a mapped file that shrinks
kills the process. Format: an 8-byte little-endian header length, a JSON header, then the tensors
(https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from asynctsqp.errors import CheckpointError, one_line
from asynctsqp.model_spec import ModelSpec
from asynctsqp.random_weights import PREFIX, RandomTensor, random_tensors, shapes_directory
from asynctsqp.tensor_codec import FILE_DTYPES, bytes_of

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
SAMPLE_BYTES = 256
SAMPLES_PER_TENSOR = 4
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
NAME_CHARACTERS = 28  # in a message that has to fit a refusal
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


class _HeaderEntry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `size` bytes from byte `offset` of `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    size: int

    def read_range(self, start: int, size: int) -> bytes:
        descriptor = os.open(self.file, os.O_RDONLY)
        try:
            return os.pread(descriptor, size, self.offset + start)
        finally:
            os.close(descriptor)

    def read_into(self, destination: torch.Tensor) -> None:
        """Fills a contiguous CPU tensor of this entry's dtype and number of elements."""
        view, offset = bytes_of(destination), self.offset
        descriptor = os.open(self.file, os.O_RDONLY)
        try:
            while view:  # one pread moves at most 2 GiB
                count = os.preadv(descriptor, [view], offset)
                if count == 0:
                    raise CheckpointError(f"{self.file} became shorter while it was read")
                view, offset = view[count:], offset + count
        finally:
            os.close(descriptor)


class Checkpoint:
    """A checked model directory: its spec, and where each tensor lies or how it is made.

    directory: has config and tokenizer; name: what people call it; model: where another process finds it.
    """

    def __init__(self, directory: Path, random_weights: bool = False) -> None:
        """random_weights: made by asynctsqp.random_weights, whether or not the directory holds any.

        Raises CheckpointError in one line for anything missing, damaged or not a LLaMA.
        """
        self.directory = directory
        self.spec = ModelSpec.read(directory / "config.json")
        prefix, base = PREFIX if random_weights else "", directory.resolve().name
        self.name = one_line(prefix + base, NAME_CHARACTERS)
        self.model = f"{prefix}{directory}"
        self.tensors: dict[str, TensorEntry] | dict[str, RandomTensor]
        self.tensors = random_tensors(base, self.spec) if random_weights else _read_headers(directory)
        for name, shape in self.spec.tensor_shapes().items():
            if name not in self.tensors:
                raise CheckpointError(f"{directory} holds no tensor {name}, which its config.json asks for")
            if self.tensors[name].shape != shape:
                raise CheckpointError(
                    f"{directory}: {name} has shape {list(self.tensors[name].shape)}, config.json says {list(shape)}"
                )

    @classmethod
    def find(cls, model: str) -> Checkpoint:
        """`model` is a directory, a hub id, or random:NAME; a hub id is downloaded once into the hub's own cache."""
        if model.startswith(PREFIX):
            return cls(shapes_directory(model.removeprefix(PREFIX)), random_weights=True)
        if os.path.isdir(model):  # unlike Path.is_dir, says no to what is too long for a name
            return cls(Path(model))
        if HUB_ID.fullmatch(model) and not model.startswith("."):
            return cls(_download(model))
        raise CheckpointError(f"there is no model directory {model!r}, and it is not a hub id (owner/name)")

    def read(self, name: str) -> torch.Tensor:
        """One tensor in the file's dtype, in memory of its own."""
        entry = self.tensors[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        entry.read_into(tensor)
        return tensor

    def fingerprint(self) -> bytes:
        """32 bytes that two sides compare to notice that they hold different models.

        Covers the spec, every tensor's name and shape, the norms, and a fixed sample of the other tensors: it
        finds mistakes fast, whatever the model's size. It is no protection against a side that lies.
        """
        digest = hashlib.sha256(repr(self.spec).encode())
        for name in sorted(self.spec.tensor_shapes()):
            entry = self.tensors[name]
            digest.update(f"{name}{entry.shape}{entry.dtype}".encode())
            for start in _sample_starts(entry):
                digest.update(entry.read_range(start, SAMPLE_BYTES))
        return digest.digest()


def short(fingerprint: bytes) -> str:
    """The form of a fingerprint that people compare."""
    return fingerprint.hex()[:12]


def _sample_starts(entry: TensorEntry | RandomTensor) -> range:
    """Where to look in a tensor: all of it for a norm or bias, else a few places spread over it."""
    if len(entry.shape) == 1:
        return range(0, entry.size, SAMPLE_BYTES)
    step = max(entry.size // SAMPLES_PER_TENSOR, SAMPLE_BYTES)
    return range(0, entry.size, step)


def _download(hub_id: str) -> Path:
    import huggingface_hub  # not needed, and slow to import, where the model is a directory

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=HUB_FILES))
    except Exception as error:  # the library's errors have no common base below Exception
        raise CheckpointError(f"cannot fetch {hub_id!r} from the model hub: {one_line(error)}") from None


def _weight_files(directory: Path) -> list[Path]:
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    try:
        names = set(msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values())
    except FileNotFoundError:
        raise CheckpointError(f"{directory} holds neither model.safetensors nor its index") from None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{index} cannot be read: {error}") from None
    if any(Path(name).name != name for name in names):
        raise CheckpointError(f"{index} names a file outside its own directory")
    return [directory / name for name in sorted(names)]


def _read_headers(directory: Path) -> dict[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    for file in _weight_files(directory):
        tensors |= _read_header(file)
    return tensors


def _read_header(file: Path) -> dict[str, TensorEntry]:
    try:
        with file.open("rb") as stream:
            file_size = os.fstat(stream.fileno()).st_size
            header_size = int.from_bytes(stream.read(8), "little")
            if not 2 <= header_size <= min(MAX_HEADER_BYTES, file_size - 8):
                raise CheckpointError(f"{file} is truncated or not a safetensors file")
            header = msgspec.json.decode(stream.read(header_size), type=dict[str, msgspec.Raw])
            entries = {
                name: msgspec.json.decode(raw, type=_HeaderEntry)
                for name, raw in header.items()
                if name != "__metadata__"
            }
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} has a damaged header: {error}") from None
    data_size = file_size - 8 - header_size
    return {name: _check_entry(file, 8 + header_size, data_size, name, entry) for name, entry in entries.items()}


def _check_entry(file: Path, data_start: int, data_size: int, name: str, entry: _HeaderEntry) -> TensorEntry:
    if entry.dtype not in FILE_DTYPES:
        raise CheckpointError(f"{file}: {name} has dtype {entry.dtype}: only floating-point weights are supported")
    dtype = FILE_DTYPES[entry.dtype]
    begin, end = entry.data_offsets
    size = dtype.itemsize
    for extent in entry.shape:
        size *= extent
    if not 0 <= begin <= end or end - begin != size or min(entry.shape, default=1) < 0:
        raise CheckpointError(f"{file} has a damaged header: {name}'s offsets do not fit its shape")
    if end > data_size:
        raise CheckpointError(f"{file} is truncated: it holds {data_size} bytes of weights, {name} ends at {end}")
    return TensorEntry(file, dtype, entry.shape, data_start + begin, size)
