"""How many answers may run or wait at once, and the word that all of them have to end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from asynctsqp.service.api_errors import RETRY_AFTER, ApiError


class Admission:
    """One service's. Make it in a running loop."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.admitted = 0
        self.stop = asyncio.Event()  # what is still on its way ends at once

    @contextlib.contextmanager
    def enter(self, answers: int) -> Iterator[None]:
        """For as long as they run. Raises ApiError where there is no room for so many more."""
        if self.admitted + answers > self._most:
            message = f"{self._most} answers are being made or waited for already: try again later"
            raise ApiError(429, "rate_limit_exceeded", message, headers=RETRY_AFTER)
        self.admitted += answers
        try:
            yield
        finally:
            self.admitted -= answers
