"""Waiting until a moment, on an event loop, to some ten microseconds and without using the processor.

An event loop's own timers are whole milliseconds in uvloop. A timerfd (Linux) is a file that can be read once its
time has come, so that the loop wakes up for it as it does for a socket. Python has them from version 3.13 on.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import time
from collections import deque

_MONOTONIC = time.CLOCK_MONOTONIC  # what time.perf_counter reads on Linux
_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC
_ABSOLUTE = 1
_COUNT_BYTES = 8  # what a read of a timerfd gives


class _Setting(ctypes.Structure):
    """struct itimerspec, of <sys/timerfd.h>: an interval, here none, and the moment."""

    _fields_ = (
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("at_s", ctypes.c_long),
        ("at_ns", ctypes.c_long),
    )


class Alarm:
    """Moments in the order in which they were asked for, none before an earlier one. Make it in a running loop."""

    def __init__(self) -> None:
        """Raises OSError where there are no timerfds."""
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._file = self._libc.timerfd_create(_MONOTONIC, _FLAGS)
        if self._file < 0:
            raise OSError(ctypes.get_errno(), "cannot make a timer")
        self._waiting: deque[tuple[float, asyncio.Future[None]]] = deque()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._file, self._ring)

    async def until(self, moment: float) -> None:
        """moment: by time.perf_counter, not before those that are waited for."""
        future: asyncio.Future[None] = self._loop.create_future()
        self._waiting.append((moment, future))
        if len(self._waiting) == 1:
            self._set()
        await future

    def close(self) -> None:
        self._loop.remove_reader(self._file)
        os.close(self._file)

    def _ring(self) -> None:
        os.read(self._file, _COUNT_BYTES)
        now = time.perf_counter()
        while self._waiting and self._waiting[0][0] <= now:
            _, future = self._waiting.popleft()
            if not future.done():
                future.set_result(None)
        if self._waiting:
            self._set()

    def _set(self) -> None:
        seconds, nanoseconds = divmod(int(self._waiting[0][0] * 1e9), 10**9)
        setting = _Setting(0, 0, seconds, nanoseconds)
        if self._libc.timerfd_settime(self._file, _ABSOLUTE, ctypes.byref(setting), None):
            raise OSError(ctypes.get_errno(), "cannot set a timer")
