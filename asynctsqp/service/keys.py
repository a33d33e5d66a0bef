"""Who may ask: keys from a file, of which only hashes are kept.

Covered: how long a comparison takes tells nothing about any key. Not covered: how many keys there are; guessing, which
keys of 16 random bytes and more make hopeless.
"""

from __future__ import annotations

import hashlib
import hmac
import stat
from pathlib import Path

from asynctsqp.errors import BadInputError

SCHEME = "bearer "


class ApiKeys:
    """The keys of one service."""

    def __init__(self, keys: list[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    @classmethod
    def read(cls, path: Path) -> ApiKeys:
        """One key a line; blank lines and those that begin with # are nothing. Raises BadInputError."""
        try:
            lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            raise BadInputError(f"--api-keys {path} cannot be read: {reason}") from None
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise BadInputError(f"--api-keys {path} holds no key: one a line")
        if any(not key.isascii() or " " in key for key in keys):
            raise BadInputError(f"--api-keys {path}: a key is printable ASCII without blanks")
        return cls(keys)

    def allow(self, authorization: str | None) -> bool:
        """authorization: the header, as in 'Bearer KEY'. Every key is compared, whichever fits."""
        if authorization is None or not authorization.lower().startswith(SCHEME):
            return False
        digest = _digest(authorization[len(SCHEME) :].strip().encode("latin-1", "replace"))
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


def readable_by_others(path: Path) -> bool:
    return bool(path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH))


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
