"""Others' text on a terminal of ours."""

from __future__ import annotations

import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline


def printable(text: str) -> str:
    """Control characters, which a terminal would obey, replaced by the sign for what cannot be shown."""
    return _CONTROL.sub("\ufffd", text)
