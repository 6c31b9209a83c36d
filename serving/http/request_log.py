"""A line in the log for each request, when it has ended, and the id that stands in it and in the response."""

from __future__ import annotations

import logging
import re
from asyncio import CancelledError
from collections.abc import Sequence
from time import perf_counter
from typing import Any
from urllib.parse import quote
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from starling.engine.generation.results import FinishReason, Timings
from starling.serving.api.api_errors import ApiError

LOGGER = logging.getLogger("starling.serve.request")

HEADER = b"x-request-id"
IGNORED_HEADER = b"x-starling-ignored"
#: What a client's own id must be to be taken: a word that fits any log.
SANE_ID = re.compile(rb"[A-Za-z0-9._:/+=@,~-]{1,128}")
#: Asked every few seconds by machines; in the log at the level debug only.
PROBES = frozenset({"/health", "/ready", "/metrics"})
#: nginx's word for a client that went away before its answer was complete; it never goes over the wire.
CLIENT_GONE = 499
#: The fields of a request's line, in JSON all of them.
FIELDS = (
    *("request_id", "client", "method", "path", "status", "prompt_tokens", "completion_tokens"),
    *("ttft_ms", "total_ms", "finish_reason", "ignored", "error", "error_code"),
)

_IN_MESSAGE = FIELDS[2:5]
_KEY = "starling.request"
_MOST_OF_A_PATH = 100
#: Of fields that were ignored: how many are named, with how many characters, and what a name may not have in a header.
_MOST_NAMES, _LONGEST_NAME, _UNFIT = 16, 64, re.compile(r"[^A-Za-z0-9_.-]")


class RequestTrace:
    """What is known of one HTTP request, for its line in the log; each part notes what it learns."""

    def __init__(self, scope: Scope) -> None:
        self._scope, self._begin = scope, perf_counter()
        self.id = _request_id(scope)
        #: Stands for the API key that it bears, and does not tell it; "" where nobody is asked for one.
        self.owner = ""
        self.status = 0
        #: Whether the whole response has been handed over for sending.
        self.complete = False
        self.client_gone = False
        #: Names of fields that were ignored, as a header may have them; "" for none.
        self.ignored = ""
        #: Of each generation that has ended, in that order.
        self._timings: list[Timings] = []
        self._prompt_tokens = 0
        self._finish_reason: FinishReason | None = None
        self._refusal: ApiError | None = None
        self._failure: BaseException | None = None

    def note_end(self, timings: Timings, reason: FinishReason, *, prompt_tokens: int) -> None:
        """A generation has ended; `prompt_tokens` are those that no other one of the request has counted.

        Of several the log has the first that ended for a reason which its client did not ask for, else the newest.
        """
        self._timings.append(timings)
        self._prompt_tokens += prompt_tokens
        if self._finish_reason in (None, "stop", "length"):
            self._finish_reason = reason

    def note_prompt_tokens(self, count: int) -> None:
        """Tokens of texts that were scored or embedded."""
        self._prompt_tokens += count

    def note_ignored(self, names: Sequence[str]) -> None:
        """Fields of the request that nobody knows: the response's header names them, and so does the log."""
        # A header's value must not end in a space, as one that ends in the empty name would.
        shown = [_UNFIT.sub("?", name[:_LONGEST_NAME]) or '""' for name in names[:_MOST_NAMES]]
        more = len(names) - len(shown)
        self.ignored = ", ".join([*shown, *([f"{more} more"] if more else [])])

    def note_refusal(self, error: ApiError) -> None:
        """The client gets this error."""
        self._refusal = error

    def note_failure(self, error: BaseException) -> None:
        """What nobody expected; its traceback goes to the log."""
        self._failure = error

    def log(self) -> None:
        """Write the line."""
        level = self._level()
        if LOGGER.isEnabledFor(level):
            fields = self._fields()
            message = f"{fields['method']} {fields['path']} {fields['status']}"
            LOGGER.log(level, message, exc_info=self._failure, extra={"fields": fields, "in_message": _IN_MESSAGE})

    def _level(self) -> int:
        status = self._refusal.status if self._refusal else self.status
        if self._failure is not None or (status == 500 and not self.client_gone):
            return logging.ERROR
        if status > 500 and not self.client_gone:
            return logging.WARNING
        return logging.DEBUG if self._scope["path"] in PROBES else logging.INFO

    def _fields(self) -> dict[str, Any]:
        timings, client = self._timings, self._scope.get("client")
        first = [one.ttft_ms for one in timings if one.new_tokens]
        return {
            "request_id": self.id,
            "client": client[0] if client else None,
            "method": self._scope["method"][:20],
            # Percent-encoded, and without the query, in which some clients put what nobody should see.
            "path": quote(self._scope["path"][:_MOST_OF_A_PATH], errors="replace"),
            "status": CLIENT_GONE if self.client_gone else self.status,
            "prompt_tokens": self._prompt_tokens if timings or self._prompt_tokens else None,
            "completion_tokens": sum(one.new_tokens for one in timings) if timings else None,
            "ttft_ms": round(min(first), 1) if first else None,
            "total_ms": round((perf_counter() - self._begin) * 1e3, 1),
            "finish_reason": self._finish_reason,
            "ignored": self.ignored or None,
            "error": self._error(),
            "error_code": self._refusal.code if self._refusal and not self.client_gone else None,
        }

    def _error(self) -> str | None:
        if self._failure is not None:
            return f"{type(self._failure).__name__}: {self._failure}"
        if self.client_gone:
            return "the client went away before the answer was complete"
        return self._refusal.logged if self._refusal else None


class RequestLog:
    """The outermost part of the application: every request, refused ones too, gets its id and its line."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, and log it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        trace = scope[_KEY] = RequestTrace(scope)

        async def receive_noted() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and not trace.complete:
                trace.client_gone = True
            return message

        async def send_noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                trace.status = message["status"]
                own = [(HEADER, trace.id.encode())]
                if trace.ignored:
                    own.append((IGNORED_HEADER, trace.ignored.encode()))
                message = {**message, "headers": [*message.get("headers", ()), *own]}
            elif not message.get("more_body", False):
                trace.complete = True
            await send(message)

        try:
            await self._app(scope, receive_noted, send_noted)
        except CancelledError as error:
            trace.note_failure(error)
            raise
        except Exception as error:
            trace.note_failure(error)
            if not trace.complete:
                raise  # the server must not take the connection for a good one
        finally:
            trace.log()


def request_trace(scope: Scope) -> RequestTrace:
    """The trace of the request that a part of the application answers."""
    trace: RequestTrace = scope[_KEY]
    return trace


def _request_id(scope: Scope) -> str:
    """The client's own id where it is sane, else a new one."""
    given = next((value for name, value in scope["headers"] if name == HEADER), b"")
    return given.decode() if SANE_ID.fullmatch(given) else uuid4().hex
