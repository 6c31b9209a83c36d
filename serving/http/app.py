"""The ASGI application: OpenAI's endpoints, health and metrics over one Service."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from starling.engine.errors import shown
from starling.serving.api.api_errors import ApiError, shutting_down, unexpected
from starling.serving.api.fields import json_object
from starling.serving.api.replies import ChatReply, CompletionReply, Reply
from starling.serving.http.answer import Answer
from starling.serving.http.api_keys import ApiKeyGuard
from starling.serving.http.body import Refusal, read_body
from starling.serving.http.host_guard import ANY, HostGuard
from starling.serving.http.request_bodies import ApiRequest, Limits, chat_request, completion_request
from starling.serving.http.request_log import RequestLog, request_trace
from starling.serving.http.scoring_endpoints import ScoringEndpoints
from starling.serving.http.served import Served
from starling.serving.http.token_endpoints import TokenEndpoints
from starling.serving.metrics.prometheus import CONTENT_TYPE

_FAILED = "the serving loop has ended by a failure, which is in the log: start the server again\n"
_CORS: dict[str, Any] = {
    "allow_methods": ("GET", "POST"),
    "allow_headers": ("*",),
    "expose_headers": ("x-request-id", "x-starling-ignored", "Retry-After"),
}


def make_app(
    served: Served,
    *,
    api_keys: Sequence[str] = (),
    max_body: int,
    allowed_hosts: Sequence[str] = (ANY,),
    allowed_origins: Sequence[str] = (),
) -> ASGIApp:
    """The application. `max_body` is the largest request body in bytes; without keys nobody is asked for one.

    `allowed_hosts` are the names that it answers to (see HostGuard), `allowed_origins` the web sites whose pages may
    read its answers ("*": all).
    """
    routes = [*_Endpoints(served, max_body).routes(), *ScoringEndpoints(served.scoring, max_body).routes()]
    if served.generating is not None:
        routes += TokenEndpoints(served.generating, max_body).routes()
    middleware = [Middleware(HostGuard, names=tuple(allowed_hosts))]
    if allowed_origins:  # before the keys: a browser asks without one whether it may send one
        middleware.append(Middleware(CORSMiddleware, allow_origins=tuple(allowed_origins), **_CORS))
    if api_keys:
        middleware.append(Middleware(ApiKeyGuard, keys=tuple(api_keys)))
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={ApiError: _refused, HTTPException: _http_error, Exception: _failed},
    )
    return RequestLog(app)


class _Endpoints:
    """The endpoints; each is one method."""

    def __init__(self, served: Served, max_body: int) -> None:
        self._served, self._max_body = served, max_body
        self._created = int(time.time())

    def routes(self) -> list[Route]:
        """Every path that is answered."""
        return [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{model:path}", self.model),
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/metrics", self.metrics),
        ]

    async def completions(self, request: Request) -> Answer:
        """POST /v1/completions."""
        return await self._answer(request, completion_request, CompletionReply)

    async def chat(self, request: Request) -> Answer:
        """POST /v1/chat/completions."""
        return await self._answer(request, chat_request, ChatReply)

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self._served.models]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        name = request.path_params["model"]
        if name not in self._served.models:
            raise ApiError(404, f"there is no model {shown(name)} here", param="model", code="model_not_found")
        return JSONResponse(self._model(name))

    async def health(self, request: Request) -> Response:
        """GET /health: the process answers, and so does the engine's thread."""
        return PlainTextResponse(_FAILED, 503) if self._served.failed else PlainTextResponse("ok\n")

    async def ready(self, request: Request) -> Response:
        """GET /ready: new requests are taken."""
        if self._served.failed:
            return PlainTextResponse(_FAILED, 503)
        if self._served.draining:
            return PlainTextResponse("not taking requests\n", 503)
        return PlainTextResponse("ready\n")

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(self._served.export_metrics(), media_type=CONTENT_TYPE)

    async def _answer(
        self, request: Request, read: Callable[[Mapping[str, Any], Limits], ApiRequest], form: type[Reply]
    ) -> Answer:
        service, trace = self._served.generating, request_trace(request.scope)
        if service is None:
            raise self._served.no_generator()
        if service.draining:
            raise shutting_down()
        body = await read_body(request, self._max_body)
        limits = service.limits
        submitted = await service.start(
            lambda: read(json_object(body), limits).of_owner(trace.owner, isolate=limits.isolate), trace.id
        )
        wanted = submitted.request
        trace.note_ignored(wanted.ignored)
        reply = form(wanted.model, service.texts, stream=wanted.stream, with_usage=wanted.include_usage)
        return Answer(service, submitted, reply, self._served.scoring)

    def _model(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "starling",
            "max_model_len": self._served.models[name],
        }


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return Refusal(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:80]}: {error.detail}"
    return Refusal(ApiError(error.status_code, message, headers=error.headers))


async def _failed(request: Request, error: Exception) -> Response:
    return Refusal(unexpected(request_trace(request.scope).id))
