"""The service as a process: its socket, its TLS, and how it ends.

SIGTERM and SIGINT: no new connections, requests on their way have --drain-s seconds, then they end with an error. A
second signal ends them at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from asynctsqp.config import EngineOptions, SamplingOptions
from asynctsqp.engine import Engine
from asynctsqp.errors import BadInputError
from asynctsqp.service.app import Service
from asynctsqp.service.attestation import Binding, Evidence
from asynctsqp.service.connections import Protocol
from asynctsqp.service.keys import ApiKeys, readable_by_others
from asynctsqp.service.options import Address, ServiceOptions
from asynctsqp.service.tls import Identity

KEEP_ALIVE_S = 75
LAST_WORDS_S = 5  # for the errors that end what has not drained
HANG_UP_S = 0.5  # for a client to say goodbye
WILDCARDS = ("0.0.0.0", "::")
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Door:
    """Where the service listens and by what it is known. Made before the engine, so that a mistake shows at once."""

    def __init__(self, address: Address, options: ServiceOptions, engine: EngineOptions) -> None:
        """Raises BadInputError for files that cannot be used, and an address that is taken."""
        self.options = options
        self.keys = None if options.api_keys is None else ApiKeys.read(Path(options.api_keys))
        if options.api_keys is not None and readable_by_others(Path(options.api_keys)):
            _say(f"warning: others can read {options.api_keys}: chmod 600")
        self.names = (address.host.lower(), *(name.lower() for name in options.tls_name))
        self.identity = _identity(address, options, engine.enclave)
        self.listener = address.listener()
        port = self.listener.getsockname()[1]
        self.url = address.url(port, tls=self.identity is not None)

    def binding(self, engine: Engine) -> Binding:
        """What a quote about this service has to be about."""
        return Binding.of(engine, None if self.identity is None else self.identity.key_hash)

    def close(self) -> None:
        self.listener.close()


async def serve(
    door: Door, engine: Engine, model: str, sampling: SamplingOptions, evidence: Evidence | None = None
) -> signal.Signals:
    """Until a signal comes, which it returns. model: the engine's name for clients."""
    asyncio.get_running_loop().set_exception_handler(_quietly)
    service = Service(engine, model, door.options, sampling, door.keys, door.names, door.binding(engine), evidence)
    server = _Server(door, service)
    keeping = asyncio.create_task(engine.keep_connected())
    try:
        if door.identity is not None:
            for line in door.identity.described():
                _say(line)
        await server.serve([door.listener])
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
    return server.signal


class _Server(uvicorn.Server):
    """uvicorn, with our signals, our last words, and the URL when it listens."""

    def __init__(self, door: Door, service: Service) -> None:
        identity = door.identity
        super().__init__(
            uvicorn.Config(
                service.app(),
                http=Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="critical",  # its errors have tracebacks
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(door.options.drain_s) + LAST_WORDS_S,
                ssl_context_factory=None if identity is None else lambda config, default: identity.context,
            )
        )
        self._door = door
        self._stop = service.admission.stop
        self.signal = signal.SIGTERM

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(f"serving {self._door.url}", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timer = asyncio.get_running_loop().call_later(self._door.options.drain_s, self._stop.set)
        hanging_up = asyncio.create_task(self._hang_up())
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
            hanging_up.cancel()

    async def _hang_up(self) -> None:
        """Cuts connections that have got their answers: a client that is idle does not answer the end of TLS."""
        state = self.server_state
        while True:
            await asyncio.sleep(HANG_UP_S)
            for connection in [] if state.tasks else list(state.connections):
                if not connection.transport.get_write_buffer_size():
                    connection.transport.abort()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Ours stay until the process ends: the engine is closed in order after this."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self._stop.set()
        else:
            self.signal = signal.Signals(sig)
        self.should_exit = True


def _identity(address: Address, options: ServiceOptions, enclave: bool) -> Identity | None:
    names = [socket.gethostname(), *LOOPBACK] if address.host in WILDCARDS else [address.host]
    names = [*options.tls_name, *names, *(LOOPBACK if address.loopback else ())]
    if options.tls_cert is not None and options.tls_key is not None:
        certificate, key = Path(options.tls_cert), Path(options.tls_key)
        return Identity.kept(certificate, key, names) if enclave else Identity.read(certificate, key)
    if options.tls == "off" or (options.tls == "auto" and address.loopback and not enclave):
        if options.tls_name:
            raise BadInputError("--tls-name is for a certificate, and there is no TLS on loopback: give it --tls on")
        return None
    return Identity.make(names)


def _quietly(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What happens to a connection outside a request, by kind: a message might quote what was sent."""
    error = context.get("exception")
    if not isinstance(error, OSError):  # clients that leave, and those that do not speak TLS
        _say(f"error in the event loop: {type(error).__name__}")


def _say(line: str) -> None:
    print(f"asynctsqp.tee: {line}", file=sys.stderr, flush=True)
