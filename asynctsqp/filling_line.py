"""How far the weights are read and the first masks made, on standard error: a line that goes when it is done.

Where standard error is no terminal, one plain line, if it takes so long that somebody may wonder.
"""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import Progress, TaskID

PATIENCE_S = 10.0


class FillingLine:
    """A filling.Report, while it is open."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._progress = Progress(console=console, transient=True) if console.is_terminal else None
        self._tasks: dict[str, TaskID] = {}
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._said = False

    def __call__(self, doing: str, done: int, total: int) -> None:
        with self._lock:
            if self._progress is not None:
                if doing not in self._tasks:
                    self._tasks[doing] = self._progress.add_task(doing)
                self._progress.update(self._tasks[doing], completed=done, total=total)
            elif not self._said and time.monotonic() - self._started > PATIENCE_S:
                self._said = True
                print(f"asynctsqp.tee: still {doing}: {100 * done // max(total, 1)} % so far", file=sys.stderr)

    def __enter__(self) -> FillingLine:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
