"""The body of a request: of limited size, in limited time, JSON."""

from __future__ import annotations

import asyncio
import re
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from asynctsqp.service.api_errors import ApiError, invalid
from asynctsqp.service.attendance import ClientGone

BODY_S = 30.0  # for all of it
DISCARDED = 16 << 20  # bytes of a body that is too large
MOST_DIGITS = 15
# What msgspec says about a value's type and nothing of the value itself
_HARMLESS = re.compile(r"(?:Expected [^$]*|Object missing required field `(\w+)`)(?: - at `\$\.?(\w*)[^`]*`)?")

Schema = TypeVar("Schema")


async def read_object(request: Request, most: int) -> dict[str, Any]:
    """Raises ApiError for anything but a JSON object of at most so many bytes; ClientGone."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "unsupported_media_type", "the body has to be JSON: Content-Type: application/json")
    try:
        async with asyncio.timeout(BODY_S):
            body = await _read(request, most)
    except TimeoutError:
        raise ApiError(408, "timeout", f"the body did not come within {BODY_S:g} s", headers=_CLOSE) from None
    except ClientDisconnect:
        raise ClientGone from None
    try:
        content = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ApiError(400, "invalid_json", "the body is not JSON") from None
    if not isinstance(content, dict):
        raise invalid("the body has to be a JSON object")
    return content


def checked(content: dict[str, Any], schema: type[Schema]) -> Schema:
    """Raises ApiError, which names the field."""
    try:
        return msgspec.convert(content, schema)
    except (msgspec.ValidationError, RecursionError) as error:
        found = _HARMLESS.fullmatch(str(error))
        if not found:
            raise invalid("a field of the body has a value that it cannot have") from None
        param = found[1] or found[2] or None
        raise invalid(str(error), param) from None


_CLOSE = {"connection": "close"}


async def _read(request: Request, most: int) -> bytes:
    """What is too large is read to its end, up to a limit: a client that is still sending would not see the error."""
    too_large = ApiError(413, "body_too_large", f"the body may have {most} bytes at most", headers=_CLOSE)
    said = request.headers.get("content-length", "0")
    said_too_much = len(said) > MOST_DIGITS or (said.isdigit() and int(said) > most)
    if said_too_much and request.headers.get("expect", "").lower() == "100-continue":
        raise too_large  # it waits for our word before it sends anything
    body, size = bytearray(), 0
    async for part in request.stream():
        size += len(part)
        if size <= most:
            body += part
        elif size > most + DISCARDED:
            raise too_large
    if size > most:
        raise too_large
    return bytes(body)
