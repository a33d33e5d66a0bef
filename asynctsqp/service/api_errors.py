"""Errors as OpenAI's clients know them: {"error": {"message", "type", "param", "code"}} and a status.

Covered: nothing of a request's content, and nothing of the engine's insides, is in any of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response

from asynctsqp.errors import (
    AsynctsqpError,
    BadInputError,
    CheckpointError,
    ContextLengthError,
    EngineClosed,
    GpuSideError,
    HandshakeRefused,
    IntegrityError,
    SharedMemoryError,
)

RETRY_AFTER = {"retry-after": "1"}
_OF_THE_GPU_SIDE = (GpuSideError, CheckpointError, HandshakeRefused, SharedMemoryError)  # of a new connection


class ApiError(Exception):
    """What a client is told."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def kind(self) -> str:
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return json_response(self.body(), self.status, self.headers)


def json_response(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, dict(headers or {}), "application/json")


def invalid(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, "invalid_value", message, param)


def unsupported(param: str, message: str) -> ApiError:
    return ApiError(400, "unsupported_parameter", message, param)


def stopping() -> ApiError:
    return ApiError(503, "shutting_down", "the service is shutting down", headers=RETRY_AFTER)


def of_engine(error: AsynctsqpError) -> ApiError:
    """What the engine failed with, as a client should see it."""
    match error:
        case ContextLengthError():
            return ApiError(400, "context_length_exceeded", str(error))
        case IntegrityError():
            message = (
                "a wrong answer of the GPU side was caught and nothing of it used: the service has to be restarted"
            )
            return ApiError(502, "integrity_violation", message)
        case EngineClosed():
            return stopping()
        case _ if isinstance(error, _OF_THE_GPU_SIDE):
            message = "the GPU side is not available at the moment: try again later"
            return ApiError(503, "gpu_side_unavailable", message, headers=RETRY_AFTER)
        case BadInputError():
            return invalid(str(error))
    return ApiError(500, "internal_error", "the request failed for a reason that is not its own")
