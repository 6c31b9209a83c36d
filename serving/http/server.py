"""Runs the application on uvicorn: one socket, and an end that finishes what runs."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from starling.engine.errors import StarlingError
from starling.serving.http.connections import IDLE_TIMEOUT_S, bounded_protocol
from starling.serving.http.logs import numeric
from starling.serving.http.served import Served

#: SIGHUP comes where the terminal is closed; Windows has none.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
#: Seconds that cancelled requests have to say so to their clients.
_FAREWELL_S = 5
#: Connections that wait to be taken, those too that come while the model is loaded.
BACKLOG = 2048


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises StarlingError where the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise StarlingError(f"--host {host} is no address of this machine: {error.strerror}; try 127.0.0.1") from None
    try:
        # A server that was killed leaves connections behind for a minute; its successor may have the port at once.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # At once: until one of them listens, any number of sockets may be bound to a port.
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise StarlingError(f"cannot listen on {host} port {port}: {error.strerror}; choose another --port") from None
    return listener


def serve(
    app: ASGIApp,
    served: Served,
    listener: socket.socket,
    *,
    grace_s: float,
    on_ready: Callable[[], None],
    max_connections: int,
    log_level: str = "info",
) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP; then finish what runs within `grace_s` seconds.

    A second SIGINT or SIGTERM ends at once. `max_connections` may be open at the same time. `log_level` is one of
    logs.LEVELS; where the lines go is for `configure_logging`.
    """
    config = uvicorn.Config(
        app,
        http=bounded_protocol(max_connections),
        ws="none",
        backlog=BACKLOG,
        # Without it uvicorn sets up loggers of its own; without a level it looks closely at every message.
        log_config=None,
        log_level=numeric(log_level),
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=IDLE_TIMEOUT_S,
        timeout_graceful_shutdown=int(grace_s) + _FAREWELL_S,
    )
    _Server(config, served, grace_s, on_ready).run(sockets=[listener])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, served: Served, grace_s: float, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._served, self._grace_s, self._on_ready = served, grace_s, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._served.drain()
        deadline = asyncio.get_running_loop().call_later(self._grace_s, self._served.cancel_all)
        await super().shutdown(sockets)
        deadline.cancel()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # `nohup` has SIGHUP ignored, which is respected.
        taken = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self.handle_exit) for number in taken}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig not in (signal.SIGINT, signal.SIGTERM) and self.should_exit:
            return  # a terminal that is closed may say so more than once
        if self.should_exit:
            os._exit(128 + sig)  # asked twice: nothing on disk is half written
        self._served.drain()
        self.should_exit = True
