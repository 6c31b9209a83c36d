"""A client of server-sent events that costs the server next to nothing: it notes bytes, and reads them afterwards."""

from __future__ import annotations

import json
import selectors
import socket
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from io import BufferedReader, BytesIO
from itertools import accumulate
from time import perf_counter
from typing import Any

from starling.engine.errors import BackendError

#: A server that sends nothing for so long has hung.
TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Event:
    """The JSON of one event, and when it was there: ms after the request was sent."""

    ms: float
    data: dict[str, Any]


@dataclass(slots=True)
class _Answer:
    """The bytes of an answer and the moment at which each piece of them came."""

    sent: float
    moments: list[float] = field(default_factory=list)
    pieces: list[bytes] = field(default_factory=list)


def read_at_once(port: int, path: str, bodies: Sequence[dict[str, Any]]) -> list[list[Event]]:
    """POST all bodies to 127.0.0.1 at once; the events of each answer.

    One thread reads all of them. Raises BackendError where the server does not answer, or not with events.
    """
    try:
        answers = _exchange(port, [_request(path, body) for body in bodies])
    except OSError as error:
        raise BackendError(f"port {port}: {error or 'no answer'}") from error
    return [_events(answer) for answer in answers]


def _request(path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + content


def _exchange(port: int, requests: Sequence[bytes]) -> list[_Answer]:
    with ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        # Connected before the first is sent, so that all are sent within a millisecond.
        sockets = [stack.enter_context(socket.create_connection(("127.0.0.1", port), TIMEOUT_S)) for _ in requests]
        answers = []
        for connection, request in zip(sockets, requests, strict=True):
            answers.append(_Answer(perf_counter()))
            connection.sendall(request)
            selector.register(connection, selectors.EVENT_READ, answers[-1])
        while selector.get_map():
            ready = selector.select(TIMEOUT_S)
            if not ready:
                raise TimeoutError(f"nothing came for {TIMEOUT_S:.0f} s")
            for key, _ in ready:
                piece = key.fileobj.recv(65536)  # type: ignore[union-attr]
                if piece:
                    key.data.moments.append(perf_counter())
                    key.data.pieces.append(piece)
                else:
                    selector.unregister(key.fileobj)
    return answers


class _Recorded:
    """What HTTPResponse wants of a socket, over bytes that are there."""

    def __init__(self, content: bytes) -> None:
        self.size = len(content)
        self.file = BufferedReader(BytesIO(content))

    def makefile(self, mode: str) -> BufferedReader[BytesIO]:
        return self.file

    @property
    def read(self) -> int:
        """Bytes that were read."""
        return self.size if self.file.closed else self.file.tell()


def _events(answer: _Answer) -> list[Event]:
    recorded = _Recorded(b"".join(answer.pieces))
    ends = list(accumulate(len(piece) for piece in answer.pieces))
    response = HTTPResponse(recorded)  # type: ignore[arg-type]  # it asks for makefile alone
    events = []
    try:
        response.begin()
        if response.status != 200:
            raise BackendError(f"status {response.status}: {response.read()[:400]!r}")
        while line := response.readline():
            # "data: [DONE]" says nothing that the connection's end does not.
            if line.startswith(b"data: {"):
                moment = answer.moments[bisect_left(ends, recorded.read)]
                events.append(Event((moment - answer.sent) * 1e3, json.loads(line[len(b"data: ") :])))
    except (HTTPException, ValueError) as error:
        raise BackendError(f"an answer that cannot be read: {error!r}") from error
    return events
