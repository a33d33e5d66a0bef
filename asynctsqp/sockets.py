"""One place for the ZeroMQ options of both sides."""

from __future__ import annotations

import zmq
import zmq.asyncio

from asynctsqp.limits import MAX_FRAME_BYTES

HEARTBEAT_MS = 1_000
UNACKNOWLEDGED_MS = 5_000
# libzmq's clock for an answer to a heartbeat also runs while one large frame is on its way to us: as long as a call
# may take (rpc.CALL_DEADLINE_S). A dead machine is noticed by the kernel, since heartbeats leave it something to
# acknowledge.
HEARTBEAT_TIMEOUT_MS = 60_000


def _socket(context: zmq.asyncio.Context, kind: int, max_frame_bytes: int) -> zmq.asyncio.Socket:
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)  # closing never waits for a peer
    socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing is queued for a connection that does not exist
    socket.setsockopt(zmq.MAXMSGSIZE, max_frame_bytes)
    # libzmq aborts the process when a heartbeat times out while its receive queue is full (an assertion on _io_error
    # in its stream engine): a flood then costs memory, and not every client's connection
    socket.setsockopt(zmq.RCVHWM, 0)
    # answered by libzmq's own I/O thread: a side that is busy computing is still alive
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.TCP_MAXRT, UNACKNOWLEDGED_MS)
    return socket


def client_socket(context: zmq.asyncio.Context, max_frame_bytes: int, server_key: str | None) -> zmq.asyncio.Socket:
    """A DEALER that makes one connection and never another: a new connection is a new handshake.

    server_key: Z85; then the connection is encrypted (CURVE), and made with nobody but who has the secret to that key.
    """
    socket = _socket(context, zmq.DEALER, max_frame_bytes)
    socket.setsockopt(zmq.RECONNECT_IVL, -1)
    if server_key is not None:
        public, secret = zmq.curve_keypair()  # for this connection only: libsodium takes it from the operating system
        socket.setsockopt(zmq.CURVE_SERVERKEY, server_key.encode())
        socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
    return socket


def server_socket(
    context: zmq.asyncio.Context, max_frame_bytes: int = MAX_FRAME_BYTES, secret: bytes | None = None
) -> zmq.asyncio.Socket:
    """A ROUTER on which sending to a client that is gone is an error, and no client can take another's name.

    secret: Z85; then clients that do not speak CURVE, or look for another key, get no connection.
    """
    socket = _socket(context, zmq.ROUTER, max_frame_bytes)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.ROUTER_HANDOVER, 0)
    if secret is not None:
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
    return socket
