"""`python -m asynctsqp.gpu`: the untrusted GPU side as a process."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import shutil
import signal
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Read by OpenMP when torch loads it. Waiting threads must sleep: the other side may need the core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import uvloop
import zmq
import zmq.asyncio

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.config import OneLineParser
from asynctsqp.errors import AsynctsqpError, BadInputError
from asynctsqp.sockets import server_socket
from asynctsqp.tensor_codec import WIRE_DTYPES
from gpu_side import executor
from gpu_side.server import Server

DEFAULT_BIND = "tcp://127.0.0.1:5555"


def main() -> int:
    parser = OneLineParser(prog="asynctsqp.gpu", description="Serve a LLaMA's matrix products to TEE sides.")
    parser.add_argument("--model", required=True, metavar="DIR_OR_HUB_ID")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--bind", default=DEFAULT_BIND, metavar="ENDPOINT", help="tcp://HOST:PORT or ipc://PATH")
    where.add_argument(
        "--local",
        action="store_true",
        help="bind in a private directory, and end when standard input closes (how a TEE side starts its own)",
    )
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda[:N]")
    parser.add_argument("--dtype", choices=tuple(WIRE_DTYPES), help="the only one to serve (default: any)")
    parser.add_argument("--threads", type=int, metavar="N", help="for tensor work on the CPU")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="asynctsqp.gpu: %(message)s")
    try:
        if arguments.threads is not None:
            if arguments.threads < 1:
                raise BadInputError("--threads is at least 1")
            torch.set_num_threads(arguments.threads)
        with _private_endpoint() if arguments.local else contextlib.nullcontext(arguments.bind) as endpoint:
            uvloop.run(_serve(endpoint, arguments.model, arguments.device, arguments.dtype, arguments.local))
    except AsynctsqpError as error:
        print(f"asynctsqp.gpu: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


async def _serve(endpoint: str, model: str, device: str, dtype: str | None, local: bool) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    if local:
        await _watch_standard_input(stop)
    serving = asyncio.create_task(_load_and_serve(endpoint, model, device, dtype))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
    for task in (serving, stopping):
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await serving


async def _load_and_serve(endpoint: str, model: str, device: str, dtype: str | None) -> None:
    context = zmq.asyncio.Context()
    try:
        with server_socket(context) as socket:
            _bind(socket, endpoint)  # before the long load: a port in use is known at once
            checkpoint = await asyncio.to_thread(Checkpoint.find, model)
            server = Server(socket, checkpoint, executor.choose(device), dtype)
            if dtype:
                await server.weights(dtype)
            print("listening", socket.getsockopt_string(zmq.LAST_ENDPOINT), flush=True)
            await server.run()
    finally:
        context.term()


def _bind(socket: zmq.asyncio.Socket, endpoint: str) -> None:
    path = Path(endpoint.removeprefix("ipc://")) if endpoint.startswith("ipc://") else None
    if path is not None and path.exists() and not stat.S_ISSOCK(path.stat().st_mode):
        raise BadInputError(f"cannot listen at {endpoint}: {path} is a file")
    mask = os.umask(0o177)  # a socket file is for its owner only
    try:
        socket.bind(endpoint.removesuffix(":0") + ":*" if endpoint.endswith(":0") else endpoint)
    except zmq.ZMQError as error:
        reason = "it is in use" if error.errno == errno.EADDRINUSE else error.strerror
        raise BadInputError(f"cannot listen at {endpoint}: {reason}") from None
    finally:
        os.umask(mask)


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


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a worker thread may be in the middle of a long load: nothing of it is worth waiting for
