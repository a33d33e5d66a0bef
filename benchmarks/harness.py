"""Worker processes that a benchmark drives: started, asked one thing at a time, and really stopped in between.

Each contender of a benchmark is a `Worker`: a process of its own (benchmarks.worker is its other end) that
lives through the run. It runs only inside `with worker.awake():`; at all other times its whole process tree is
stopped with SIGSTOP, so that no spinning thread or housekeeping of an idle contender takes a core from the
other one.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

REPLY_TIMEOUT_S = 300.0
END_TIMEOUT_S = 15.0
SETTLE_S = 0.05  # after SIGCONT: heartbeats, timers that fell due meanwhile
QUIET = 0.05  # of the cores' time, for others: above it, what is measured is disturbed
PATIENCE_S = 10.0  # how long to wait for that
LOOK_S = 0.2


class WorkerFailed(RuntimeError):
    """A worker ended, hung, or could not do what it was asked; the message is one line."""


class Worker:
    """One contender's process. A context manager; asleep from the first `sleep` on, but for `awake` blocks."""

    def __init__(self, name: str, module: str, environment: Mapping[str, str], patience_s: float = PATIENCE_S) -> None:
        """Starts `python -m module`. environment: added to ours, without OpenMP's variables (see `openmp_free`);
        patience_s: how long a measurement waits for a quiet machine."""
        self.name = name
        self._patience_s = patience_s
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,  # Ctrl-C is for us, and we end the workers
            env=openmp_free(os.environ) | dict(environment),
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end(at_once=error is not None)

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Sends one command and waits for its result. Raises WorkerFailed."""
        self.send(command, **arguments)
        return self.receive()

    def send(self, command: str, **arguments: Any) -> None:
        """The first half of `ask`, to have several workers at work at once. Raises WorkerFailed."""
        pipe = self._process.stdin
        try:
            if pipe is not None:
                pipe.write(json.dumps({"command": command, "arguments": arguments}) + "\n")
                pipe.flush()
        except BrokenPipeError:
            raise WorkerFailed(f"{self.name} ended with code {self._process.wait()}") from None

    def receive(self) -> dict[str, Any]:
        """The second half of `ask`."""
        pipe = self._process.stdout
        if pipe is None or not select.select([pipe], [], [], REPLY_TIMEOUT_S)[0]:
            raise WorkerFailed(f"{self.name} gave no answer in {REPLY_TIMEOUT_S:.0f} s")
        line = pipe.readline()
        if not line:
            raise WorkerFailed(f"{self.name} ended with code {self._process.wait()}")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerFailed(f"{self.name}: {reply['error']}")
        result: dict[str, Any] = reply["result"]
        return result

    def sleep(self) -> None:
        """Stops the whole tree. To be called while nothing is asked of the worker."""
        self._signal(signal.SIGSTOP)

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Lets the tree run for the length of the block."""
        self._signal(signal.SIGCONT)
        time.sleep(SETTLE_S)
        try:
            yield
        finally:
            self.sleep()

    def measure(self, command: str, **arguments: Any) -> dict[str, Any]:
        """`ask`, awake for just that, once the machine is quiet or patience ends.

        `others_share` in the result: of the time of our cores, what others took meanwhile.
        """
        _wait_for_quiet(self._patience_s)
        with self.awake():
            others = _Others(self._tree())
            result = self.ask(command, **arguments)
            return result | {"others_share": others.share()}

    def memory(self) -> dict[str, dict[str, int]]:
        """For each process of the tree, by the module that it runs: see `memory_of`."""
        return {_module(process): memory_of(process.pid) for process in self._tree()}

    def cpu_s(self) -> float:
        """Seconds that the tree's processes have computed so far; one that has ended is not in it any more."""
        return float(sum(sum(process.cpu_times()[:2]) for process in self._tree()))

    def _tree(self) -> list[psutil.Process]:
        try:
            parent = psutil.Process(self._process.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            raise WorkerFailed(f"{self.name} ended with code {self._process.wait()}") from None

    def _signal(self, number: signal.Signals) -> None:
        """All at once, that is, within microseconds: two sides of one connection must not see each other silent."""
        for pid in [process.pid for process in self._tree()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _end(self, at_once: bool) -> None:
        """Kills the worker itself at once at most: what it started tidies up, when it is alone or is asked to end."""
        others: list[psutil.Process] = []
        with contextlib.suppress(WorkerFailed):
            _, *others = self._tree()
            self._signal(signal.SIGCONT)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        try:
            self._process.wait(0 if at_once else END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for other in others:
            with contextlib.suppress(psutil.NoSuchProcess):
                other.terminate()
        for other in psutil.wait_procs(others, END_TIMEOUT_S)[1]:
            other.kill()


class _Others:
    """How much of our cores' time goes, from now on, to other processes than these, the hypervisor's included.

    A disturbed sample says little: threads that wait for each other by spinning lose many times the time taken.
    """

    def __init__(self, processes: Sequence[psutil.Process]) -> None:
        self._processes = processes
        self._start = time.perf_counter()
        self._taken_s = self._taken()

    def share(self) -> float:
        cores_s = (time.perf_counter() - self._start) * len(os.sched_getaffinity(0))
        return float(max(0.0, self._taken() - self._taken_s) / cores_s)

    def _taken(self) -> float:
        """Seconds since some start, in the kernel's ticks."""
        cores = psutil.cpu_times(percpu=True)
        busy = sum(sum(cores[core]) - cores[core].idle - cores[core].iowait for core in os.sched_getaffinity(0))
        own = sum(sum(process.cpu_times()[:2]) for process in self._processes)
        return float(busy - own)


def _wait_for_quiet(patience_s: float) -> None:
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        others = _Others(())
        time.sleep(LOOK_S)
        if others.share() <= QUIET:
            return


def openmp_free(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what would change a contender's threads behind the benchmark's back."""
    prefixes = ("OMP_", "GOMP_", "KMP_", "MKL_")
    return {name: value for name, value in environment.items() if not name.startswith(prefixes)}


def use_cores(count: int | None) -> None:
    """Binds this process, and with it every later worker and its children, to `count` cores (None: all we have).

    This is what makes "the same total threads" true: however many threads a contender starts, it has these cores.
    """
    if count is not None:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[:count])


def memory_of(pid: int) -> dict[str, int]:
    """Bytes of resident memory: the peak so far, and what there is now by kind (shared memory, mapped files, rest)."""
    names = {"VmHWM": "peak", "RssAnon": "anonymous", "RssFile": "file", "RssShmem": "shared"}
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {names[key]: int(words[0]) * 1024 for field, *words in lines if (key := field.rstrip(":")) in names}


def _module(process: psutil.Process) -> str:
    command: list[str] = process.cmdline()
    return command[command.index("-m") + 1] if "-m" in command[:-1] else "?"
