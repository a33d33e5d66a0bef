"""The GPU side as a process of its own: signals, the endpoint, loading, serving, stopping."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket as socketlib
import stat
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import uvloop
import zmq
import zmq.asyncio

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.errors import BadInputError
from asynctsqp.limits import MAX_FRAME_BYTES
from asynctsqp.sockets import server_socket
from gpu_side.device import choose
from gpu_side.made_weights import Kind
from gpu_side.mask_server import MaskServer
from gpu_side.secret_file import public_key, secret_key
from gpu_side.server import Server

MAX_REQUEST_BYTES = 4096  # of a frame to a mask peer, whose clients send no tensors


@dataclass(frozen=True)
class Settings:
    """dtype: the only one to serve, or None; weight_bits: of integer weights that are made at the start, or None;
    mask_peer_secret: of a mask peer, or None for a GPU side.
    """

    model: str
    device: str
    dtype: str | None
    weight_bits: int | None
    threads: int
    mask_peer_secret: Path | None


def serve(endpoint: str, settings: Settings, owned: bool) -> None:
    """Runs until SIGINT or SIGTERM.

    owned: by the TEE side that started it: it also ends when standard input closes, and removes its socket's directory.
    Raises BadInputError for anything that keeps it from starting, DeviceLost where nothing can be served any more.
    """
    logging.basicConfig(level=logging.WARNING, format="asynctsqp.gpu: %(message)s")
    torch.set_num_threads(settings.threads)
    secret = None if settings.mask_peer_secret is None else secret_key(settings.mask_peer_secret)
    with _directory_of(endpoint) if owned else contextlib.nullcontext():
        uvloop.run(_until_stopped(endpoint, settings, secret, owned))


async def _until_stopped(endpoint: str, settings: Settings, secret: bytes | None, owned: bool) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    if owned:
        await _watch_standard_input(stop)
    serve = _serve_operations(endpoint, settings) if secret is None else _serve_masks(endpoint, settings, secret)
    serving = asyncio.create_task(serve)
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
    for task in (serving, stopping):
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await serving


async def _serve_operations(endpoint: str, settings: Settings) -> None:
    with _listening(endpoint) as socket:
        executor = choose(settings.device, settings.threads)
        checkpoint = await asyncio.to_thread(Checkpoint.find, settings.model)
        server = Server(socket, checkpoint, executor, settings.dtype)
        await asyncio.gather(server.run(), _announce(server, socket, (settings.dtype, settings.weight_bits)))


async def _serve_masks(endpoint: str, settings: Settings, secret: bytes) -> None:
    with _listening(endpoint, MAX_REQUEST_BYTES, secret) as socket:
        executor = choose(settings.device, settings.threads)
        checkpoint = await asyncio.to_thread(Checkpoint.find, settings.model)
        server = MaskServer(socket, checkpoint, executor)
        _say_where(socket)
        print("mask-peer-key", public_key(secret), flush=True)
        await server.run()


async def _announce(server: Server, socket: zmq.asyncio.Socket, kinds: Iterable[Kind | None]) -> None:
    """Once the weights that are sure to be asked for are made."""
    for kind in kinds:
        if kind is not None:
            await server.weights.of(kind)
    _say_where(socket)


def _say_where(socket: zmq.asyncio.Socket) -> None:
    print("listening", socket.getsockopt_string(zmq.LAST_ENDPOINT), flush=True)


@contextlib.contextmanager
def _listening(
    endpoint: str, max_frame_bytes: int = MAX_FRAME_BYTES, secret: bytes | None = None
) -> Iterator[zmq.asyncio.Socket]:
    """Bound before the long load: a port in use is known at once."""
    context = zmq.asyncio.Context()
    try:
        with server_socket(context, max_frame_bytes, secret) as socket, _bound(socket, endpoint):
            yield socket
    finally:
        context.term()


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
    with socketlib.socket(socketlib.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return
        except OSError as error:  # of another kind than ours, say
            raise BadInputError(f"cannot listen at {endpoint}: {path} is in use: {error.strerror}") from None
        raise BadInputError(f"cannot listen at {endpoint}: it is in use")


@contextlib.contextmanager
def _directory_of(endpoint: str) -> Iterator[None]:
    """Goes when the process ends, unless there is something else in it."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            Path(endpoint.removeprefix("ipc://")).parent.rmdir()


async def _watch_standard_input(stop: asyncio.Event) -> None:
    """Standard input is a pipe from the TEE side: it closes when that side ends, however it ends."""

    class Watch(asyncio.Protocol):
        def connection_lost(self, exc: Exception | None) -> None:
            stop.set()

    await asyncio.get_running_loop().connect_read_pipe(Watch, sys.stdin)
