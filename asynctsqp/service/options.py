"""The flags of the service, and the address that it listens at."""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass

from asynctsqp.config import check_at_least, check_choices, check_types, option, parse_size
from asynctsqp.endpoints import MAX_PORT
from asynctsqp.errors import BadInputError

_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^\s:\[\]]+)):(\d{1,5})")
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ServiceOptions:
    """How an engine is served. Raises BadInputError for a value that makes no sense."""

    tls: str = option(
        "auto",
        "auto: on, but for loopback outside an enclave",
        choices=("auto", "on", "off"),
    )
    tls_cert: str | None = option(None, "certificate chain in PEM, instead of a key made at start", metavar="FILE")
    tls_key: str | None = option(None, "its private key", metavar="FILE")
    tls_name: tuple[str, ...] = option(
        (), "a name or address that clients use, for the certificate made at start", action="append", metavar="NAME"
    )
    api_keys: str | None = option(None, "one key a line; without it only loopback may be listened at", metavar="FILE")
    max_requests: int = option(256, "answers that run or wait; more are refused with 429", type=int, metavar="N")
    max_body: int = option(MIB, "of a request (default: 1M)", type=parse_size, metavar="SIZE")
    max_seconds: float = option(600.0, "for one request", type=float, metavar="N")
    drain_s: float = option(30.0, "for requests on their way when the service is told to end", type=float, metavar="N")

    def __post_init__(self) -> None:
        check_types(self)
        check_choices(self)
        check_at_least(self, 1, "max_requests", "max_body", "max_seconds")
        check_at_least(self, 0, "drain_s")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise BadInputError("--tls-cert and --tls-key belong together")
        if self.tls == "off" and self.tls_cert is not None:
            raise BadInputError("--tls off and --tls-cert contradict each other")
        if self.tls_cert is not None and self.tls_name:
            raise BadInputError("--tls-name is for the certificate made at start, not for --tls-cert")


@dataclass(frozen=True)
class Address:
    """Where to listen: what the user wrote, and what it means."""

    host: str
    port: int
    family: socket.AddressFamily
    sockaddr: tuple[object, ...]

    @classmethod
    def parse(cls, text: str) -> Address:
        """'127.0.0.1:8000', '[::1]:0', 'localhost:8000'. Raises BadInputError."""
        match = _ADDRESS.fullmatch(text)
        if not match or int(match[3]) > MAX_PORT:
            raise BadInputError(f"--serve takes HOST:PORT or [IPV6]:PORT, not {text[:120]!r}")
        host, port = match[1] or match[2], int(match[3])
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except (OSError, UnicodeError):
            raise BadInputError(f"--serve: there is no address for {host!r}") from None
        family, _, _, _, sockaddr = found[0]
        return cls(host, port, family, sockaddr)

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return ipaddress.ip_address(str(self.sockaddr[0]).partition("%")[0]).is_loopback

    def url(self, port: int, tls: bool) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if tls else 'http'}://{host}:{port}"

    def listener(self) -> socket.socket:
        """A bound socket, which does not listen yet. Raises BadInputError."""
        listener = socket.socket(self.family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(self.sockaddr)
        except OSError as error:
            listener.close()
            raise BadInputError(f"--serve: cannot listen at {self.host} port {self.port}: {error.strerror}") from None
        return listener
