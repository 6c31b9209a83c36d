"""Bytes over a socket, for what no HTTP client would send: torn, slow, malformed."""

import json
import socket
from contextlib import suppress
from typing import Any

PATIENCE_S = 60


def request(
    path: str, body: Any = None, *, method: str | None = None, host: str = "127.0.0.1", **headers: str
) -> bytes:
    """The bytes of a request on a connection that is closed after it; a body that is not bytes becomes JSON."""
    content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    fields = {"Host": host, "Content-Type": "application/json", "Content-Length": str(len(content))}
    fields |= {"Connection": "close"} | {name.replace("_", "-"): value for name, value in headers.items()}
    head = f"{method or ('GET' if body is None else 'POST')} {path} HTTP/1.1\r\n"
    return (head + "".join(f"{name}: {value}\r\n" for name, value in fields.items()) + "\r\n").encode(
        "latin-1"
    ) + content


def connect(port: int) -> socket.socket:
    """A connection to a server on this machine."""
    return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)


def read_all(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection, also by a reset."""
    parts = []
    try:
        while part := connection.recv(2**16):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def exchange(port: int, data: bytes) -> bytes:
    """Send bytes on a connection of their own; all that comes back."""
    with connect(port) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):  # it may be refused before all is sent
            connection.sendall(data)
        return read_all(connection)


def status_of(answer: bytes) -> int:
    """The status of an answer; 0 for what is none."""
    parts = answer.split(b" ", 2)
    return int(parts[1]) if parts[0].startswith(b"HTTP/1.") and len(parts) > 1 else 0


def body_of(answer: bytes) -> bytes:
    """What comes after the headers."""
    return answer.partition(b"\r\n\r\n")[2]
