"""The secret key of a mask peer: a file that only its owner can read.

Covered: a key that others may have read, or may exchange, is refused; one that is made is never readable by others,
not even for a moment, and replaces nothing.
Not covered: whoever has the machine has the key; a key in a backup.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import zmq

from asynctsqp.errors import BadInputError

KEY_CHARACTERS = 40  # Z85 of 32 bytes
Z85 = re.compile(rb"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")


def secret_key(file: Path) -> bytes:
    """In Z85, as libzmq takes it; made where there is no such file. Raises BadInputError."""
    try:
        try:
            return _read(file)
        except FileNotFoundError:
            return _make(file)
    except OSError as error:
        raise BadInputError(f"--mask-peer-secret {str(file)!r}: {error.strerror}") from None


def public_key(secret: bytes) -> str:
    """Of a secret key, both in Z85."""
    return zmq.curve_public(secret).decode()


def _read(file: Path) -> bytes:
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)  # a pipe of that name must not make us wait
    with os.fdopen(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BadInputError(f"--mask-peer-secret {str(file)!r} is not a file")
        if status.st_mode & 0o077 or status.st_uid not in (0, os.geteuid()):
            raise BadInputError(f"others can read --mask-peer-secret {str(file)!r}: chmod 600 it, or make a new key")
        secret = stream.read(KEY_CHARACTERS + 2).strip()
    if not Z85.fullmatch(secret):
        raise BadInputError(f"--mask-peer-secret {str(file)!r} holds no key: remove it, and one will be made")
    return secret


def _make(file: Path) -> bytes:
    public, secret = zmq.curve_keypair()
    while public.startswith(b"-"):  # a command line takes it for a flag
        public, secret = zmq.curve_keypair()
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(secret + b"\n")
    return secret
