"""An event loop in a thread of its own, and the bridge to it from whatever loop the caller runs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
import uvloop

from asynctsqp.errors import EngineClosed
from asynctsqp.limits import HELPER_THREADS

Result = TypeVar("Result")
NewLoop = Callable[[], asyncio.AbstractEventLoop]
LOOPS: dict[str, NewLoop] = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}


class LoopThread:
    """A loop's thread, whose torch settings are its own: the process's other threads keep theirs."""

    def __init__(self, name: str, torch_threads: int, new_loop: NewLoop = uvloop.new_event_loop) -> None:
        self._loop = new_loop()
        self._loop.set_default_executor(ThreadPoolExecutor(HELPER_THREADS, f"{name}-helper"))
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(torch_threads, started), name=name, daemon=True)
        self._thread.start()
        started.wait()

    async def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Awaits `work`, which runs in the thread. Cancelling the caller cancels it there.

        Raises EngineClosed if it was the thread's owner who cancelled it.
        """
        try:
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise EngineClosed("the engine was closed") from None

    def stop(self) -> None:
        """Ends the loop. Everything in it must have ended before."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self, torch_threads: int, started: threading.Event) -> None:
        set_threads_of_this_thread(torch_threads)
        asyncio.set_event_loop(self._loop)
        started.set()
        with torch.no_grad():
            self._loop.run_forever()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()


def set_threads_of_this_thread(count: int) -> None:
    """torch.set_num_threads sets two things: OpenMP's number for the calling thread, and the default for threads
    that use torch later. The second is the caller's business: put it back, from a thread that then ends."""
    default = torch.get_num_threads()
    torch.set_num_threads(count)
    restore = threading.Thread(target=torch.set_num_threads, args=(default,))
    restore.start()
    restore.join()
