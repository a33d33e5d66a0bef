"""Files that a report goes into: opened early, and every failure is one line."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from asynctsqp.errors import BadInputError

BUFFER_BYTES = 1 << 16


def open_output(file: Path, what: str) -> BinaryIO:
    """The file, emptied. what: of its content, for the error. Raises BadInputError where it cannot be written."""
    try:
        return file.open("wb", buffering=BUFFER_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise cannot_write(file, what, error) from None


def cannot_write(file: Path, what: str, error: Exception) -> BadInputError:
    reason = error.strerror if isinstance(error, OSError) else error
    return BadInputError(f"cannot write {what} to {str(file)!r}: {reason}; choose another file")
