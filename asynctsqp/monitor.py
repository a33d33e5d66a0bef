"""What happens to a client's connection, as ZeroMQ's monitor of its socket tells it."""

from __future__ import annotations

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

_CONNECTED = zmq.Event.HANDSHAKE_SUCCEEDED
_HANDSHAKE_FAILED = (
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL | zmq.Event.HANDSHAKE_FAILED_PROTOCOL | zmq.Event.HANDSHAKE_FAILED_AUTH
)
_ENDED = zmq.Event.DISCONNECTED | zmq.Event.CLOSED | _HANDSHAKE_FAILED


class Monitor:
    """Of a socket that connects once. One reader at a time."""

    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        self._watched = socket
        self._events = socket.get_monitor_socket(_CONNECTED | _ENDED)

    async def made(self) -> bool:
        """Waits for ZeroMQ's own handshake to end. -> whether there is a connection."""
        return await self._next() == _CONNECTED

    async def ended(self) -> None:
        """Waits until the connection that was made is gone."""
        while not await self._next() & _ENDED:
            pass

    def close(self) -> None:
        """Before the socket is closed."""
        self._watched.disable_monitor()
        self._events.close()

    async def _next(self) -> int:
        event: int = parse_monitor_message(await self._events.recv_multipart())["event"]
        return event
