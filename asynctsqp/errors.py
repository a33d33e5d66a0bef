"""Every error that this project raises on purpose.

    AsynctsqpError
    |-- BadInputError            the caller's arguments, prompt or files          exit code 2
    |   |-- CheckpointError      a model directory that cannot be used
    |   |-- PromptError          a prompt that cannot be run
    |   |   `-- ContextLengthError     it is longer than the model's context
    |   |-- SharedMemoryError    no room, or no right, to make a region
    |   `-- HandshakeRefused     the sides will not work together with this model or setting
    |-- GpuSideError             the untrusted side                               exit code 3
    |   |-- GpuSideUnreachable   nobody answers at the endpoint                   may be retried
    |   |-- GpuSideLost          the connection ended while it was in use         may be retried
    |   |-- ProtocolError        it sent something that is not of the protocol
    |   `-- CallRefused          it answered one call with an error
    |-- IntegrityError           a wrong answer was caught                        exit code 4
    |-- AttestationError         no quote, or one that proves nothing             exit code 5
    |-- DeviceLost               the GPU side's device fails every call           exit code 1
    `-- EngineClosed             a call on an engine that is not running

`retryable` says whether the same call may be made again on a new connection. The text of each error is
one line that says what to do next; it never contains a prompt, a token or an activation.
"""

from __future__ import annotations

from typing import Self


class AsynctsqpError(Exception):
    """Base of all errors of this project."""

    exit_code = 1
    retryable = False

    def again(self) -> Self:
        """The same for somebody else: a raised exception collects the traceback of whoever awaited it."""
        same = type(self)(*self.args)
        same.__cause__ = self.__cause__
        return same


class BadInputError(AsynctsqpError):
    """The caller's fault: arguments, prompt or files."""

    exit_code = 2


class CheckpointError(BadInputError):
    """A model directory that is missing, damaged or not a LLaMA."""


class PromptError(BadInputError):
    """A prompt that is empty, too long, or too large for the KV memory."""


class ContextLengthError(PromptError):
    """A prompt that is longer than the model's context."""


class SharedMemoryError(BadInputError):
    """A shared-memory region cannot be made or mapped."""


class HandshakeRefused(BadInputError):
    """One side refuses this model, dtype, transport or protocol version of the other."""


class GpuSideError(AsynctsqpError):
    """Something went wrong on, or on the way to, the GPU side."""

    exit_code = 3


class GpuSideUnreachable(GpuSideError):
    """Nobody answers at the endpoint."""

    retryable = True


class GpuSideLost(GpuSideError):
    """The connection ended while calls depended on it."""

    retryable = True


class ProtocolError(GpuSideError):
    """The GPU side sent something that no honest one sends."""


class CallRefused(GpuSideError):
    """The GPU side answered one call with an error."""


class IntegrityError(AsynctsqpError):
    """The GPU side gave a wrong answer and was caught."""

    exit_code = 4


class AttestationError(AsynctsqpError):
    """There is no quote, or it does not prove what it should."""

    exit_code = 5


class DeviceLost(AsynctsqpError):
    """Of a GPU side: from here on its device fails every call of this process."""


class EngineClosed(AsynctsqpError):
    """The engine is not running."""


def one_line(reason: object, limit: int = 300) -> str:
    """Somebody else's message as part of ours: one line of printable ASCII, of bounded length."""
    words = " ".join(str(reason)[: 4 * limit].split())
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in words)[:limit]
