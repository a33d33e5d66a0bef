"""Addresses of a GPU side and of a mask peer, as users write them."""

from __future__ import annotations

import ipaddress
import os
import re
import socket

from asynctsqp.errors import BadInputError

MAX_PORT = 65535
LOOPBACK = "localhost"
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


def local_endpoint(directory: str) -> str:
    """Where a GPU side listens that a TEE side has started for itself: in a directory (mode 0700) that it has made."""
    return f"ipc://{directory}/gpu.sock"


def check_peer(endpoint: str) -> str:
    """Returns a mask peer's endpoint. Raises BadInputError for one that could not be of a party of its own."""
    host, port = _host_and_port(check_endpoint("--mask-peer", endpoint))
    if not host:
        raise BadInputError("--mask-peer takes tcp://HOST:PORT: a process on this machine is no second party")
    if port in ("*", 0):
        raise BadInputError(f"--mask-peer takes the port that the mask peer listens at, not {endpoint[:120]!r}")
    return endpoint


def check_apart(gpu: str | None, peer: str | None) -> None:
    """Raises BadInputError where the GPU side and the mask peer are one and the same. gpu: None for a local one."""
    if gpu is not None and peer is not None and _host_and_port(gpu) == _host_and_port(peer):
        raise BadInputError(
            "--gpu and --mask-peer are the same endpoint: who makes the masks must not see what is masked with them"
        )


def same_host(gpu: str | None, peer: str) -> bool:
    """Whether both are on one machine as far as their endpoints tell: one party, then, unless they are tunnels."""
    here = LOOPBACK if gpu is None else _host_and_port(gpu)[0] or LOOPBACK
    return here == _host_and_port(peer)[0]


def is_this_machine(host: str) -> bool:
    """Whether a name or an address is this machine's own wherever it is looked up."""
    return _host(host) == LOOPBACK


def _host_and_port(endpoint: str) -> tuple[str, int | str]:
    """Alike where they name the same: ('', path) for ipc."""
    tcp = _TCP.fullmatch(endpoint)
    if tcp is None:
        return "", os.path.realpath(endpoint.removeprefix("ipc://"))
    return _host(tcp[1]), tcp[2] if tcp[2] == "*" else int(tcp[2])


def _host(name: str) -> str:
    """One spelling of a host; names of this machine itself become LOOPBACK. Nothing is looked up."""
    name = name.strip("[]").lower().rstrip(".")
    if name in ("localhost", "*") or name.endswith(".localhost"):
        return LOOPBACK
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        try:
            address = ipaddress.ip_address(socket.inet_aton(name))  # 127.1 and the like
        except (OSError, UnicodeError):
            return name
    address = getattr(address, "ipv4_mapped", None) or address
    return LOOPBACK if address.is_loopback or address.is_unspecified else str(address)
