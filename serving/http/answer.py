"""One request's answer on the wire: a JSON object, or server-sent events; it ends when the client goes away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from starling.engine.batching.request import RequestHandle
from starling.engine.errors import RequestFailed
from starling.engine.generation.results import FinishReason, GenerationChunk, Timings
from starling.serving.api.api_errors import ApiError, out_of_time, shutting_down, unexpected
from starling.serving.api.replies import Logprobs, Reply
from starling.serving.http.request_bodies import ApiRequest
from starling.serving.http.request_log import RequestTrace, request_trace
from starling.serving.http.service import Service

_EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the events
]
DONE = b"data: [DONE]\n\n"


class Answer:
    """An ASGI response that reads one request to its end."""

    def __init__(self, service: Service, handle: RequestHandle, request: ApiRequest, reply: Reply) -> None:
        self._service, self._handle, self._request, self._reply = service, handle, request, reply
        self._ends = _end_tokens(service, request)
        #: Characters sent so far.
        self._offset = 0
        self._recorded = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer. A client that goes away cancels its request, which frees the row within a step."""
        trace = request_trace(scope)
        watcher = asyncio.create_task(_cancel_on_disconnect(receive, self._handle))
        try:
            if self._request.stream:
                await self._stream(trace, scope, receive, send)
            else:
                await self._whole(trace, scope, receive, send)
        finally:
            watcher.cancel()
            self._service.finish(self._handle, recorded=self._recorded)

    async def _whole(self, trace: RequestTrace, scope: Scope, receive: Receive, send: Send) -> None:
        texts: list[str] = []
        entries: list[Any] = []
        reason, timings = "", None
        try:
            async for chunk in self._chunks(trace):
                texts.append(chunk.text)
                entries += self._logprobs(chunk) or ()
                reason, timings = chunk.finish_reason or "", chunk.timings
        except ApiError as error:
            await Refusal(error)(scope, receive, send)
            return
        assert timings is not None
        logprobs = None if self._request.params.logprobs is None else entries
        whole = partial(self._reply.whole, "".join(texts), logprobs, reason, timings)
        # Twenty alternatives of each of thousands of tokens take a second to write, in which streams go on.
        content = await self._service.work(lambda: _in_pieces(whole())) if entries else _json(whole())
        await Response(content, media_type="application/json")(scope, receive, send)

    async def _stream(self, trace: RequestTrace, scope: Scope, receive: Receive, send: Send) -> None:
        events = self._events(trace)
        try:
            # The status waits for the first token: a request that fails before it gets its own.
            first = await anext(events)
        except ApiError as error:
            await Refusal(error)(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": _EVENT_HEADERS})
        await _send_body(send, first)
        try:
            async for event in events:
                await _send_body(send, event)
        except Exception as error:
            refusal = error if isinstance(error, ApiError) else unexpected(trace.id)
            if refusal is not error:
                trace.note_failure(error)
            trace.note_refusal(refusal)
            await _send_body(send, _event(refusal.body()))
        await send({"type": "http.response.body", "body": DONE})

    async def _events(self, trace: RequestTrace) -> AsyncIterator[bytes]:
        timings: Timings | None = None
        opening = self._reply.opening()
        async for chunk in self._chunks(trace):
            if opening is not None:
                yield _event(opening)
                opening = None
            logprobs = self._logprobs(chunk)
            if chunk.text or logprobs or chunk.finish_reason:
                yield _event(self._reply.chunk(chunk.text, logprobs, chunk.finish_reason))
            timings = chunk.timings
        if self._request.include_usage and timings is not None:
            yield _event(self._reply.usage_chunk(timings))

    async def _chunks(self, trace: RequestTrace) -> AsyncIterator[GenerationChunk]:
        """The chunks of a request that ends well. Raises ApiError for one that does not."""
        try:
            async for chunk in self._handle.chunks():
                if chunk.timings is not None and chunk.finish_reason is not None:
                    self._record_end(trace, chunk.timings, chunk.finish_reason)
                if chunk.finish_reason == "deadline":
                    raise out_of_time(f"deadline_s was {self._request.deadline_s}: the answer was not complete by then")
                if chunk.finish_reason in ("cancelled", "interrupted"):
                    raise shutting_down()
                yield chunk
        except RequestFailed as error:
            self._record_end(trace, self._handle.partial.timings, "failed")
            trace.note_failure(error)
            raise unexpected(trace.id) from error

    def _record_end(self, trace: RequestTrace, timings: Timings, reason: FinishReason) -> None:
        """The one place where a generation's end enters the metrics and the log."""
        self._recorded = True
        self._service.metrics.record(timings)
        trace.note_end(timings, reason)

    def _logprobs(self, chunk: GenerationChunk) -> Logprobs | None:
        offset = self._offset
        self._offset += len(chunk.text)
        if self._request.params.logprobs is None:
            return None
        if chunk.logprob is None or chunk.token in self._ends:
            return []
        return [(offset, chunk.logprob)]


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
        return _json(content)


async def _cancel_on_disconnect(receive: Receive, handle: RequestHandle) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    handle.cancel()


async def _send_body(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


def _event(document: dict[str, Any]) -> bytes:
    return b"data: " + _json(document) + b"\n\n"


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def _json(document: Any) -> bytes:
    """The document in UTF-8, which cannot hold half a surrogate pair: that becomes a question mark."""
    return _ENCODER.encode(document).encode("utf-8", "replace")


def _in_pieces(document: Any) -> bytes:
    """The same; the interpreter can turn to other threads in between."""
    return "".join(_ENCODER.iterencode(document)).encode("utf-8", "replace")


def _end_tokens(service: Service, request: ApiRequest) -> frozenset[int]:
    """Tokens that end the answer and are no part of its text."""
    own = () if request.params.ignore_eos else service.engine.bundle.tokens.eos
    return frozenset((*own, *request.params.stop_token_ids))
