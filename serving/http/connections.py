"""Connections that hold a server's resources without giving it work: how many there may be, and for how long.

uvicorn has limits for a request's headers in bytes and for an idle connection after an answer; it has none for the time
in which the headers must arrive, for a client that does not read, or for the number of connections (its
`limit_concurrency` answers 503 and keeps the connection).
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import ClassVar, cast

from uvicorn.protocols.http.h11_impl import H11Protocol

LOGGER = logging.getLogger("starling.serve")

#: Seconds for a request's line and headers to arrive, from the connection's beginning or their own first byte on.
HEADERS_TIMEOUT_S = 10.0
#: Seconds for which a client may leave its answer unread, the buffers between full.
UNREAD_TIMEOUT_S = 60.0
#: Seconds of an idle connection, after an answer.
IDLE_TIMEOUT_S = 30

#: Seconds between two lines in the log about refused connections.
_QUIET_S = 60.0


class BoundedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 within those limits."""

    most_connections: ClassVar[int]
    headers_timeout_s: ClassVar[float] = HEADERS_TIMEOUT_S
    unread_timeout_s: ClassVar[float] = UNREAD_TIMEOUT_S
    _last_said: ClassVar[float] = -_QUIET_S

    _headers_due: asyncio.TimerHandle | None = None
    _unread_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuse one too many; else wait for its first request, not for ever."""
        super().connection_made(transport)
        if len(self.connections) > self.most_connections:
            self._say_full()
            self._end(b"503 Service Unavailable", b"too many connections: try again later")
        else:
            self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers, which would hold on to the connection."""
        self._cancel_headers()
        self._cancel_unread()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of a request: those of its headers do not buy it more time."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self._waits_for_headers():
            self._watch_headers()
        else:
            self._cancel_headers()

    def pause_writing(self) -> None:
        """The client does not read what it asked for."""
        super().pause_writing()
        self._unread_due = self.loop.call_later(self.unread_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """It reads again."""
        self._cancel_unread()
        super().resume_writing()

    def _waits_for_headers(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _watch_headers(self) -> None:
        if self._headers_due is None:
            self._headers_due = self.loop.call_later(self.headers_timeout_s, self._headers_are_late)

    def _cancel_headers(self) -> None:
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None

    def _cancel_unread(self) -> None:
        if self._unread_due is not None:
            self._unread_due.cancel()
            self._unread_due = None

    def _headers_are_late(self) -> None:
        self._headers_due = None
        if self._waits_for_headers() and not self.transport.is_closing():
            self._end(b"408 Request Timeout", b"the request's headers did not arrive in time")

    def _end(self, status: bytes, text: bytes) -> None:
        head = (
            b"HTTP/1.1 %s\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
        )
        self.transport.write(head % (status, len(text) + 1) + text + b"\n")
        self.transport.close()

    def _say_full(self) -> None:
        now = time.monotonic()
        if now - self._last_said >= _QUIET_S:
            type(self)._last_said = now
            LOGGER.warning(f"more than {self.most_connections} connections: further ones are refused")


def bounded_protocol(most_connections: int) -> type[asyncio.Protocol]:
    """The protocol of one server, for `uvicorn.Config(http=…)`."""
    return cast(type[asyncio.Protocol], type("Protocol", (BoundedProtocol,), {"most_connections": most_connections}))
