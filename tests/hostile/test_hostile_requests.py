"""Whatever bytes a client sends, it gets an answer or a refusal, soon, and nobody else notices."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hostile_json import SAMPLING, body, messages, mutated
from http_server import MODEL, Server, serving
from raw_http import body_of, exchange, request, status_of

pytestmark = pytest.mark.slow

CLIENTS, LONGEST_S = 6, 10.0
#: A refusal, or an answer; 0: bytes that are no request, whose connection was closed or that wait for more.
EXPECTED = {200, 400, 401, 403, 404, 405, 408, 413, 415, 429, 504}
PATHS = {
    "/v1/completions": {"model": MODEL, "prompt": "Hi", "max_tokens": 1},
    "/v1/chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
}
#: What the log must not have: a failure of ours, whatever became of the request.
FAILURES = ("Traceback", " ERROR ", "Exception")


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[Server]:
    options = ("--max-seq", "64", "--max-batch", "4", "--max-queue", "64", "--max-body", "100000")
    with serving(tiny_bundle, *options) as running:
        yield running


def try_all(server: Server, area: str, count: int, make: Callable[[random.Random], bytes]) -> Counter[int]:
    """Send so many requests, made from their numbers; how many got which status. Fails for what is neither an answer
    nor a refusal, what takes too long, and for a failure in the log."""

    def one(number: int) -> tuple[int, float, bytes, bytes]:
        data = make(random.Random(f"{area} {number}"))
        begin = time.monotonic()
        answer = exchange(server.port, data)
        return status_of(answer), time.monotonic() - begin, data, answer

    with ThreadPoolExecutor(CLIENTS) as pool:
        results = list(pool.map(one, range(count)))
    counts = Counter(status for status, *_ in results)
    longest = max(seconds for _, seconds, *_ in results)
    failures = [line for line in list(server.log) if any(word in line for word in FAILURES)]
    said = f"longest {longest:.1f} s, statuses {dict(counts)}, failures in the log {len(failures)}"
    print(f"\n{area}: {count} inputs, {said}")
    for status, seconds, data, answer in results:
        assert status in EXPECTED, (data[:300], answer[:300])
        assert seconds < LONGEST_S, data[:300]
        if status not in (200, 408) and body_of(answer).startswith(b"{"):
            error = json.loads(body_of(answer))["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert len(answer) < 2000, answer
    assert not failures, failures[:3]
    assert server.process.poll() is None
    assert server.request("GET", "/health")[0] == 200
    return counts


def test_bodies(server: Server, rounds: int) -> None:
    def make(draw: random.Random) -> bytes:
        path = draw.choice(list(PATHS))
        base = PATHS[path]
        if "messages" in base and draw.random() < 0.4:
            base = base | {"messages": messages(draw)}
        return request(path, body(draw, base, SAMPLING))

    counts = try_all(server, "bodies", 700 * rounds, make)
    assert counts[400] > 300 * rounds
    assert counts[200] > 20 * rounds


def test_heads(server: Server, rounds: int) -> None:
    good = [request(path, base) for path, base in PATHS.items()]
    good += [request(path) for path in ("/health", "/ready", "/metrics", "/v1/models", "/v1/models/m", "/nothing")]
    odd = (
        *(
            "Transfer-Encoding: chunked",
            "Content-Length: -1",
            "Content-Length: 99999999999999999999",
            "Host: a\r\nHost: b",
        ),
        *(
            "Expect: 100-continue",
            "Upgrade: websocket\r\nConnection: Upgrade",
            "X: " + "a" * 20_000,
            "X\x00: y",
            " folded",
        ),
        *(
            "Authorization: Bearer \xa0",
            "Content-Type: text/plain",
            "X-Request-ID: a\tb",
            "Origin: null",
            "Connection: x",
        ),
    )

    def make(draw: random.Random) -> bytes:
        data = draw.choice(good)
        head, _, rest = data.partition(b"\r\n")
        choice = draw.randrange(4)
        if choice == 0:
            method = draw.choice(("GET", "PUT", "HEAD", "OPTIONS", "TRACE", "CONNECT", "get", "A" * 300, "\x00"))
            head = method.encode() + b" " + head.partition(b" ")[2]
        elif choice == 1:
            tail = draw.choice(("%00", "%0d%0aX-Evil:1", "../../etc/passwd", "%ed%a0%80", "a" * 5000, "?" + "q" * 9000))
            head = b"GET /v1/models/" + tail.encode() + b" HTTP/1.1"
        elif choice == 2:
            head += b"\r\n" + draw.choice(odd).encode("latin-1")
        else:
            return mutated(draw, data[: data.index(b"\r\n\r\n")]) + b"\r\n\r\n" + data.partition(b"\r\n\r\n")[2]
        return head + b"\r\n" + rest

    # A head that promises more than comes would wait for its limit: the client says that it has no more.
    EXPECTED_HERE = EXPECTED | {0, 100}
    counts: Counter[int] = Counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(lambda number: _sent(server, make(random.Random(number))), range(250 * rounds)))
    for data, answer, seconds in answers:
        counts[status_of(answer)] += 1
        assert status_of(answer) in EXPECTED_HERE, (data[:300], answer[:300])
        assert seconds < LONGEST_S
        assert b"X-Evil" not in answer.partition(b"\r\n\r\n")[0]
    print(f"\nheads: {len(answers)} inputs, longest {max(s for *_, s in answers):.1f} s, statuses {dict(counts)}")
    assert counts[200] > 20 * rounds
    assert counts[400] > 20 * rounds
    assert not [line for line in list(server.log) if any(word in line for word in FAILURES)]
    assert server.request("GET", "/health")[0] == 200


def test_figures_are_even_after_all_that(server: Server) -> None:
    assert server.request("POST", "/v1/completions", PATHS["/v1/completions"])[0] == 200
    end = time.monotonic() + LONGEST_S
    while server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting") > 0:
        assert time.monotonic() < end
        time.sleep(0.05)
    ended = server.metric("vllm:request_success_total")
    assert ended > 0
    assert server.metric("vllm:request_prompt_tokens_count") == ended
    assert server.metric("vllm:request_generation_tokens_sum") == server.metric("vllm:generation_tokens_total")


def _sent(server: Server, data: bytes) -> tuple[bytes, Any, float]:
    from raw_http import connect, read_all

    begin = time.monotonic()
    with connect(server.port) as client:
        try:
            client.sendall(data)
            client.settimeout(LONGEST_S / 20)
            answer = client.recv(2**16)
            client.setblocking(True)
        except TimeoutError:
            answer = b""  # it waits for more, for as long as it may
        except OSError:
            answer = read_all(client)
    return data, answer, time.monotonic() - begin
