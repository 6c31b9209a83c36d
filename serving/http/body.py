"""Bodies: a request's, read within limits of size and time; a response's, as JSON or as server-sent events."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from starling.serving.api.api_errors import ApiError, too_large
from starling.serving.http.request_log import request_trace

#: Seconds in which a body must arrive.
BODY_TIMEOUT_S = 30
#: Bytes of an oversized body that are read and thrown away, so that the client comes to read the refusal.
DRAIN_BYTES = 16 * 2**20
EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the events
]
#: The last event.
DONE = b"data: [DONE]\n\n"

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


async def read_body(request: Request, limit: int) -> bytes:
    """The body, of at most `limit` bytes. Raises ApiError: 413 for more, 408 for too slow, 415 for no JSON."""
    # What a web page may send to another site without asking is never JSON.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body is not said to be JSON: send Content-Type: application/json")
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await _read(request, limit)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_TIMEOUT_S} s: send it again") from None
    except ClientDisconnect:
        raise ApiError(400, "the body broke off") from None


async def _read(request: Request, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size <= limit:
            parts.append(part)
        else:
            parts.clear()
        if size > limit + DRAIN_BYTES:
            break
    if size > limit:
        raise too_large(limit)
    return b"".join(parts)


def json_bytes(document: Any) -> bytes:
    """The document in UTF-8, which cannot hold half a surrogate pair: that becomes a question mark."""
    return _ENCODER.encode(document).encode("utf-8", "replace")


def json_in_pieces(document: Any) -> bytes:
    """The same; the interpreter can turn to other threads in between."""
    return "".join(_ENCODER.iterencode(document)).encode("utf-8", "replace")


def event(document: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json_bytes(document) + b"\n\n"


class Refusal(JSONResponse):
    """An error as the response to a request, in whose log line it stands."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.body(), status_code=error.status, headers=error.headers)
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        request_trace(scope).note_refusal(self._error)
        await super().__call__(scope, receive, send)

    def render(self, content: Any) -> bytes:
        """The body. Half a surrogate pair, which JSON can bring in and UTF-8 cannot hold, becomes a question mark."""
        return json_bytes(content)
