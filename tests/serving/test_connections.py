"""A connection that gives the server no work is ended, however it withholds it: real uvicorn, raw sockets."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator

import pytest
import uvicorn
from raw_http import body_of, connect, exchange, read_all, request, status_of
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from starling.serving.http.connections import BoundedProtocol

#: Seconds that everything may take here, and a time by which it must have happened, on a busy machine too.
LIMIT_S, SOON_S = 0.5, 30
MOST = 4
ENDLESS = b"x" * 65536


class QuickProtocol(BoundedProtocol):
    most_connections = MOST
    headers_timeout_s = LIMIT_S
    unread_timeout_s = LIMIT_S


async def small(request: Request) -> Response:
    return PlainTextResponse("small")


async def slow(request: Request) -> Response:
    await asyncio.sleep(3 * LIMIT_S)
    return PlainTextResponse("slow")


async def endless(request: Request) -> Response:
    async def parts() -> AsyncIterator[bytes]:
        try:
            while True:
                await asyncio.sleep(0)
                yield ENDLESS
        finally:
            request.app.state.ended.set()

    return StreamingResponse(parts())


@pytest.fixture
def ended() -> threading.Event:
    return threading.Event()


@pytest.fixture
def port(ended: threading.Event) -> Iterator[int]:
    app = Starlette(routes=[Route("/small", small), Route("/slow", slow), Route("/endless", endless)])
    app.state.ended = ended
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, http=QuickProtocol, ws="none", log_config=None, lifespan="off", timeout_keep_alive=60)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    port = listener.getsockname()[1]
    assert exchange_until_served(port)
    yield port
    server.should_exit = server.force_exit = True
    thread.join(SOON_S)
    listener.close()


def exchange_until_served(port: int) -> bool:
    end = time.monotonic() + SOON_S
    while time.monotonic() < end:
        try:
            return status_of(exchange(port, request("/small"))) == 200
        except ConnectionRefusedError:
            time.sleep(0.02)
    return False


@pytest.mark.parametrize("head", [b"", b"GET /small HT", b"GET /small HTTP/1.1\r\nHost: localhost\r\n"], ids=len)
def test_headers_that_do_not_come_end_the_connection(port: int, head: bytes) -> None:
    with connect(port) as client:
        client.sendall(head)
        assert status_of(read_all(client)) == 408


def test_bytes_now_and_then_buy_no_time(port: int) -> None:
    with connect(port) as client:
        client.sendall(b"GET /small HTTP/1.1\r\n")
        client.settimeout(LIMIT_S / 10)
        answer, end = b"", time.monotonic() + SOON_S
        while not answer:
            assert time.monotonic() < end
            try:
                client.sendall(b"a: b\r\n")
                answer = client.recv(1000)
            except TimeoutError:
                continue
        assert status_of(answer) == 408


def test_a_second_request_has_the_same_time_for_its_headers(port: int) -> None:
    whole = request("/small", Connection="keep-alive")
    with connect(port) as client:
        client.sendall(whole)
        answer = b""
        while not answer.endswith(b"small"):
            answer += client.recv(1000)
        assert status_of(answer) == 200
        client.sendall(whole[:20])
        assert status_of(read_all(client)) == 408


def test_a_body_after_its_answer_keeps_no_connection(port: int) -> None:
    head = b"POST /none HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n"
    with connect(port) as client:
        client.sendall(head)
        client.settimeout(LIMIT_S / 10)
        answer, end, open_ = b"", time.monotonic() + SOON_S, True
        while open_:
            assert time.monotonic() < end
            try:
                client.sendall(b"x")
                part = client.recv(1000)
                answer, open_ = answer + part, bool(part)
            except TimeoutError:
                continue
            except (BrokenPipeError, ConnectionResetError):
                open_ = False
        assert status_of(answer) == 404


def test_an_answer_may_take_longer_than_its_headers(port: int) -> None:
    assert body_of(exchange(port, request("/slow"))) == b"slow"


def test_a_client_that_reads_nothing_is_given_up(port: int, ended: threading.Event) -> None:
    with connect(port) as client:
        client.sendall(request("/endless"))
        assert ended.wait(SOON_S)


def test_one_connection_too_many_is_refused_and_makes_room_for_none(port: int) -> None:
    idle = [connect(port) for _ in range(MOST)]
    for client in idle:
        client.sendall(request("/slow"))
    time.sleep(LIMIT_S / 2)
    refused = exchange(port, request("/small"))
    assert status_of(refused) == 503
    assert b"too many connections" in refused
    assert [body_of(read_all(client)) for client in idle] == [b"slow"] * MOST
    assert status_of(exchange(port, request("/small"))) == 200
    for client in idle:
        client.close()
