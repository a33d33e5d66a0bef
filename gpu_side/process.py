"""The GPU side as a process of its own: signals, the endpoint, loading, serving, stopping."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import shutil
import signal
import socket as socketlib
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import uvloop
import zmq
import zmq.asyncio

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.errors import BadInputError
from asynctsqp.sockets import server_socket
from gpu_side import executor
from gpu_side.server import Server


def serve(bind: str | None, model: str, device: str, dtype: str | None, threads: int) -> None:
    """Runs until SIGINT or SIGTERM.

    bind: an endpoint, or None for a private one that is served until standard input closes: then the process
    belongs to the TEE side that started it. Raises BadInputError for anything that keeps it from starting.
    """
    logging.basicConfig(level=logging.WARNING, format="asynctsqp.gpu: %(message)s")
    torch.set_num_threads(threads)
    with _private_endpoint() if bind is None else contextlib.nullcontext(bind) as endpoint:
        uvloop.run(_until_stopped(endpoint, model, device, dtype, threads, owned=bind is None))


async def _until_stopped(endpoint: str, model: str, device: str, dtype: str | None, threads: int, owned: bool) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    if owned:
        await _watch_standard_input(stop)
    serving = asyncio.create_task(_load_and_serve(endpoint, model, device, dtype, threads))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
    for task in (serving, stopping):
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await serving


async def _load_and_serve(endpoint: str, model: str, device: str, dtype: str | None, threads: int) -> None:
    context = zmq.asyncio.Context()
    try:
        # bound before the long load: a port in use is known at once
        with server_socket(context) as socket, _bound(socket, endpoint):
            chosen = executor.choose(device, threads)
            checkpoint = await asyncio.to_thread(Checkpoint.find, model)
            server = Server(socket, checkpoint, chosen, dtype)
            await asyncio.gather(server.run(), _announce(server, socket, dtype))
    finally:
        context.term()


async def _announce(server: Server, socket: zmq.asyncio.Socket, dtype: str | None) -> None:
    if dtype:
        await server.weights(dtype)
    print("listening", socket.getsockopt_string(zmq.LAST_ENDPOINT), flush=True)


@contextlib.contextmanager
def _bound(socket: zmq.asyncio.Socket, endpoint: str) -> Iterator[None]:
    _bind(socket, endpoint)
    try:
        yield
    finally:
        if endpoint.startswith("ipc://"):
            Path(endpoint.removeprefix("ipc://")).unlink(missing_ok=True)


def _bind(socket: zmq.asyncio.Socket, endpoint: str) -> None:
    path = Path(endpoint.removeprefix("ipc://")) if endpoint.startswith("ipc://") else None
    if path is not None and path.exists():
        _check_socket_is_stale(path, endpoint)
    mask = os.umask(0o177)  # a socket file is for its owner only
    try:
        socket.bind(endpoint.removesuffix(":0") + ":*" if endpoint.endswith(":0") else endpoint)
    except zmq.ZMQError as error:
        reason = "it is in use" if error.errno == errno.EADDRINUSE else error.strerror
        raise BadInputError(f"cannot listen at {endpoint}: {reason}") from None
    finally:
        os.umask(mask)


def _check_socket_is_stale(path: Path, endpoint: str) -> None:
    """ZeroMQ would replace whatever lies there, another server's socket too."""
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise BadInputError(f"cannot listen at {endpoint}: {path} is not a socket")
    with contextlib.suppress(ConnectionRefusedError), socketlib.socket(socketlib.AF_UNIX) as probe:
        probe.connect(str(path))
        raise BadInputError(f"cannot listen at {endpoint}: it is in use")


@contextlib.contextmanager
def _private_endpoint() -> Iterator[str]:
    """A socket in a directory (mode 0700) that goes when the process ends."""
    directory = tempfile.mkdtemp(prefix="asynctsqp-")
    try:
        yield f"ipc://{directory}/gpu.sock"
    finally:
        shutil.rmtree(directory, ignore_errors=True)


async def _watch_standard_input(stop: asyncio.Event) -> None:
    """Standard input is a pipe from the TEE side: it closes when that side ends, however it ends."""

    class Watch(asyncio.Protocol):
        def connection_lost(self, exc: Exception | None) -> None:
            stop.set()

    await asyncio.get_running_loop().connect_read_pipe(Watch, sys.stdin)
