"""The log of calls: one line of JSON for each, as they happen, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, get_type_hints

import msgspec

from asynctsqp.errors import BadInputError, one_line
from asynctsqp.reports.output_file import cannot_write, open_output
from asynctsqp.reports.records import RpcRecord

MAX_LINE_BYTES = 1 << 16  # a record takes some hundred; a longer line is not ours
MAX_NAME = 40
MAX_NUMBER = 1e15  # of seconds: sums of as many records as a file can hold stay finite

_FIELDS = get_type_hints(RpcRecord)
_MAY_BE_NEGATIVE = {"start_at", "gpu_start_at", "layer", "lane", "slot"}


class RpcLog:
    """Writes records to a file, some of them late: what is buffered is there after `close`, or the `with`.

    Raises BadInputError when the file cannot be opened, and by `write` and `close` when it is full.
    """

    def __init__(self, file: Path) -> None:
        self._path = file
        self._file: BinaryIO = open_output(file, "the RPC log")
        self._encode = msgspec.json.Encoder().encode

    def write(self, record: RpcRecord) -> None:
        try:
            self._file.write(self._encode(record) + b"\n")
        except OSError as error:
            raise cannot_write(self._path, "the RPC log", error) from None

    def close(self) -> None:
        """May be called again."""
        try:
            self._file.close()
        except OSError as error:
            raise cannot_write(self._path, "the RPC log", error) from None

    def __enter__(self) -> RpcLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_log(file: Path, note: Callable[[str], None]) -> list[RpcRecord]:
    """The records of a log, with every number finite and every name printable.

    `note` gets one line where the last record was cut off, as that of a killed run is. Raises BadInputError, with
    file and line, for a file that cannot be read, is damaged, or holds no record.
    """
    records: list[RpcRecord] = []
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(_lines(lines), 1):
                try:
                    records.append(_record(line))
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                    place = f"{str(file)!r}, line {number}"
                    if line.endswith(b"\n") or len(line) >= MAX_LINE_BYTES or not records:
                        raise BadInputError(f"{place}, is not a record of a call: {one_line(error)}") from None
                    note(f"{place}, was cut off: it is left out")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadInputError(f"cannot read the RPC log {str(file)!r}: {reason}") from None
    if not records:
        raise BadInputError(f"{str(file)!r} holds no calls: write one with python -m asynctsqp.tee --log-rpc FILE")
    return records


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """A line that is too long comes in parts: the first of them is no record, which ends the reading."""
    return iter(lambda: file.readline(MAX_LINE_BYTES), b"")


def _record(line: bytes) -> RpcRecord:
    """Raises msgspec.DecodeError, UnicodeDecodeError or RecursionError for anything else than a record."""
    raw = msgspec.json.decode(line, type=dict[str, int | float | str | None])
    return msgspec.convert({name: _sane(name, value) for name, value in raw.items()}, RpcRecord)


def _sane(name: str, value: int | float | str | None) -> int | float | str | None:
    """A number that a report can add up, or a name that a terminal can show; a wrong type stays as it is."""
    if isinstance(value, str):
        return one_line(value, MAX_NAME)
    if value is None and _FIELDS.get(name) is float:
        return 0.0  # how JSON writes what is not finite
    if isinstance(value, int | float):
        least = -MAX_NUMBER if name in _MAY_BE_NEGATIVE else 0
        return type(value)(min(max(value, least), MAX_NUMBER))
    return value
