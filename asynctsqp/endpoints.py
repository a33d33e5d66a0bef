"""Addresses of a GPU side, as users write them."""

from __future__ import annotations

import re

from asynctsqp.errors import BadInputError

MAX_PORT = 65535
MAX_SOCKET_PATH = 107  # bytes that the kernel takes

_TCP = re.compile(r"tcp://(\[[0-9a-fA-F:.%\w]+\]|[\w.*-]+):(\d{1,5}|\*)")
_IPC = re.compile(r"ipc://(.+)")


def check_endpoint(flag: str, endpoint: str) -> str:
    """Returns the endpoint. Raises BadInputError for anything but tcp://HOST:PORT and ipc://PATH."""
    tcp, ipc = _TCP.fullmatch(endpoint), _IPC.fullmatch(endpoint)
    if tcp and (tcp[2] == "*" or int(tcp[2]) <= MAX_PORT):
        return endpoint
    if ipc and len(ipc[1].encode()) <= MAX_SOCKET_PATH and "\0" not in endpoint:
        return endpoint
    raise BadInputError(f"{flag} takes tcp://HOST:PORT or ipc://PATH, not {endpoint[:120]!r}")
