"""How fast bytes really go through a proxy that leads back to this process: what its throttle is worth."""

from __future__ import annotations

import socket
import threading
import time

from benchmarks.harness import WorkerFailed

ROOM = 1 << 20
TIMEOUT_S = 60.0


def bits_per_s(listener: socket.socket, port: int, count: int) -> dict[str, float]:
    """There and back, one after the other. port: of a proxy that forwards to `listener`; count: bytes each way.

    Raises OSError or WorkerFailed.
    """
    listener.settimeout(TIMEOUT_S)
    with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as near:
        far, _ = listener.accept()
        with far:
            far.settimeout(TIMEOUT_S)
            return {"there": _rate(near, far, count), "back": _rate(far, near, count)}


def _rate(source: socket.socket, target: socket.socket, count: int) -> float:
    sender = threading.Thread(target=source.sendall, args=(bytes(count),), daemon=True)
    room, missing = bytearray(ROOM), count
    start = time.perf_counter()
    sender.start()
    while missing:
        received = target.recv_into(room)
        if not received:
            raise WorkerFailed("the proxy closed a connection in the middle of a transfer")
        missing -= received
    spent = time.perf_counter() - start
    sender.join()
    return 8 * count / spent
