"""How those who read weights and make masks say how far they are."""

from __future__ import annotations

from collections.abc import Callable

Report = Callable[[str, int, int], None]  # what is being done, how much of it is, of how much; any thread may call it


def silent(doing: str, done: int, total: int) -> None:
    """A Report to nobody."""
