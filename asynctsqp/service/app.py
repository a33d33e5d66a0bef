"""The routes, as a starlette application of its own for each engine: no state is shared between two."""

from __future__ import annotations

import re
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, ExceptionHandler, Message, Receive, Scope, Send

from asynctsqp.config import SamplingOptions
from asynctsqp.endpoints import LOOPBACK, is_this_machine
from asynctsqp.engine import Engine
from asynctsqp.errors import AsynctsqpError
from asynctsqp.service.admission import Admission
from asynctsqp.service.answering import Desk, Stream, Whole
from asynctsqp.service.api_errors import ApiError, json_response, of_engine
from asynctsqp.service.attendance import ClientGone
from asynctsqp.service.attestation import Binding, Evidence, attestation
from asynctsqp.service.body import checked, read_object
from asynctsqp.service.forms import ChatForm, Form, TextForm
from asynctsqp.service.keys import ApiKeys
from asynctsqp.service.metrics import CONTENT_TYPE, Metrics
from asynctsqp.service.options import ServiceOptions
from asynctsqp.service.parameters import only_supported
from asynctsqp.service.schemas import ChatAsked, TextAsked

_PORT = re.compile(r"(?<![:\[]):\d*$")
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics", "/attestation")


@dataclass(frozen=True)
class Service:
    """One engine, as it is served. Make it in a running loop."""

    engine: Engine
    model: str  # its name
    options: ServiceOptions
    sampling: SamplingOptions  # what a request does not say
    keys: ApiKeys | None
    names: tuple[str, ...]  # by which clients may call it, besides the loopback's
    binding: Binding
    evidence: Evidence | None = None
    admission: Admission = field(init=False)
    metrics: Metrics = field(init=False)
    since: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "admission", Admission(self.options.max_requests))
        object.__setattr__(self, "metrics", Metrics(self.engine, self.admission))
        object.__setattr__(self, "since", int(time.time()))

    def app(self) -> ASGIApp:
        routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._text, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._one_model),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/attestation", self._attestation),
        ]
        handlers: dict[Any, ExceptionHandler] = {
            ApiError: _on_api_error,
            AsynctsqpError: _on_engine_error,
            HTTPException: _on_http_error,
            ClientGone: _on_client_gone,
            Exception: _on_defect,
        }
        return self._guarded(Starlette(routes=routes, exception_handlers=handlers))

    def _guarded(self, app: ASGIApp) -> ASGIApp:
        """Counts every request, and answers none of /v1 without a key.

        Where there are no keys, a name is what keeps web pages out: a browser on this machine may be led here under
        the name of somebody's page (DNS rebinding), which could then read the answers.
        """

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            path = scope["path"]
            label = next((known for known in PATHS if path == known or path.startswith(known + "/")), "other")

            async def counting(message: Message) -> None:
                if message["type"] == "http.response.start":
                    self.metrics.requests.labels(label, str(message["status"])).inc()
                await send(message)

            if self.keys is None and not self._is_called(Request(scope).headers.get("host")):
                message = "without --api-keys this service answers to this machine's own names only"
                await ApiError(403, "unknown_host", message).response()(scope, receive, counting)
            elif path.startswith("/v1") and not self._allowed(scope):
                refusal = ApiError(401, "invalid_api_key", "a valid API key is needed: Authorization: Bearer KEY")
                refusal.headers["www-authenticate"] = "Bearer"
                await refusal.response()(scope, receive, counting)
            else:
                await app(scope, receive, counting)

        return guarded

    def _allowed(self, scope: Scope) -> bool:
        return self.keys is None or self.keys.allow(Request(scope).headers.get("authorization"))

    def _is_called(self, host: str | None) -> bool:
        """host: the header, which no browser leaves out."""
        name = _PORT.sub("", host or LOOPBACK)
        return name.lower() in self.names or is_this_machine(name)

    async def _chat(self, request: Request) -> Any:
        content = only_supported(await read_object(request, self.options.max_body), ChatAsked.__struct_fields__)
        return self._answer(checked(content, ChatAsked), ChatForm())

    async def _text(self, request: Request) -> Any:
        content = only_supported(await read_object(request, self.options.max_body), TextAsked.__struct_fields__)
        return self._answer(checked(content, TextAsked), TextForm())

    def _answer(self, asked: ChatAsked | TextAsked, form: Form) -> Whole | Stream:
        if asked.model != self.model:
            raise self._no_model("model")
        jobs, copies = asked.jobs(asdict(self.sampling), self.options.max_requests), asked.n or 1
        desk = Desk(self.engine, self.admission, self.metrics, self.model, self.options.max_seconds)
        if asked.stream:
            return Stream(desk, form, jobs, copies, asked.include_usage)
        return Whole(desk, form, jobs, copies)

    async def _models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._described()]})

    async def _one_model(self, request: Request) -> Response:
        if request.path_params["name"] != self.model:
            raise self._no_model(None)
        return json_response(self._described())

    def _described(self) -> dict[str, Any]:
        return {"id": self.model, "object": "model", "created": self.since, "owned_by": "asynctsqp"}

    def _no_model(self, param: str | None) -> ApiError:
        return ApiError(404, "model_not_found", f"there is no such model here: this service has {self.model!r}", param)

    async def _health(self, request: Request) -> Response:
        failure = self.engine.failure
        if failure is None and not self.admission.stop.is_set():
            return json_response({"status": "ok"})
        reason = "shutting_down" if failure is None else of_engine(failure).code
        return json_response({"status": "unavailable", "reason": reason}, 503)

    async def _metrics(self, request: Request) -> Response:
        return Response(await self.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def _attestation(self, request: Request) -> Response:
        return json_response(await attestation(self.evidence, self.binding, request.query_params.get("nonce")))


async def _on_api_error(request: Request, error: Exception) -> Response:
    return error.response() if isinstance(error, ApiError) else ApiError(500, "internal_error", "").response()


async def _on_engine_error(request: Request, error: Exception) -> Response:
    return of_engine(error if isinstance(error, AsynctsqpError) else AsynctsqpError()).response()


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Of the router: a path or a method that there is not."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    code, message = {
        404: ("not_found", "there is nothing at this path"),
        405: ("method_not_allowed", "this path does not have that method"),
    }.get(status, ("invalid_request", "the request cannot be understood"))
    headers = error.headers if isinstance(error, HTTPException) else None
    return ApiError(status, code, message, headers=headers).response()


async def _on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody gets it; nginx's number, for the metric


async def _on_defect(request: Request, error: Exception) -> Response:
    """One line with the place and no message, which might quote what was asked."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    print(f"asynctsqp.tee: error: {type(error).__name__} in {place.name}, line {place.lineno}", file=sys.stderr)
    return ApiError(500, "internal_error", "the request failed for a reason that is not its own").response()
