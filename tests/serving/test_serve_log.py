"""`starling serve` leaves one line for each request, whatever it was and however it ended, and nobody can forge one."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from command_line import copy_bundle, replace_file, starling_command
from http_server import MODEL, Server, serving, wait_until

from starling.engine import Engine
from starling.engine.serving_loop import ServingLoop
from starling.serving.api.replies import CompletionReply
from starling.serving.http.answer import Answer
from starling.serving.http.app import make_app
from starling.serving.http.logs import MOST_CHARACTERS, configure_logging
from starling.serving.http.request_bodies import Limits, completion_request
from starling.serving.http.request_log import FIELDS, RequestLog, request_trace
from starling.serving.http.served import Served
from starling.serving.http.service import Service

pytestmark = pytest.mark.slow

PROMPT = "Once upon a time"
BASE: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 3}
ENDLESS: dict[str, Any] = BASE | {"max_tokens": 4000, "ignore_eos": True}
LIMITS = ("--max-batch", "4", "--max-seq", "4096", "--max-prompt", "64")
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
#: Where every line of the text form begins; lines of a traceback begin with spaces.
HEAD = re.compile(rf"{TIME} (DEBUG|INFO|WARNING|ERROR) [\w.]+: ")
KEY = "sk-not-for-the-log"


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[Server]:
    with serving(tiny_bundle, *LIMITS, "--log-format", "json") as running:
        yield running


@pytest.fixture(scope="module")
def texts(tiny_bundle: Path) -> Iterator[Server]:
    with serving(tiny_bundle, *LIMITS, "--log-level", "debug", env={"STARLING_API_KEY": KEY}) as running:
        yield running


def line_of(server: Server, request_id: str) -> dict[str, Any]:
    """The JSON line of a request, which must be its only one."""

    def found() -> list[dict[str, Any]]:
        return [entry for entry in map(json.loads, list(server.log)) if entry.get("request_id") == request_id]

    assert wait_until(found, 10), server.log
    [entry] = found()
    return entry


def text_of(server: Server, request_id: str) -> str:
    """The text line of a request."""

    def found() -> list[str]:
        return [line for line in list(server.log) if f"request_id={request_id} " in line]

    assert wait_until(found, 10), server.log
    [line] = found()
    return line


def post(server: Server, body: Any, request_id: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    status, answered, content = server.request(
        "POST", "/v1/completions", body, {"x-request-id": request_id, "Authorization": f"Bearer {KEY}", **headers}
    )
    return status, dict(answered), content


def test_a_line_has_what_the_client_and_the_metrics_were_told(server: Server) -> None:
    before = server.metric("vllm:time_to_first_token_seconds_sum")
    _, headers, content = post(server, BASE, "whole-1")
    assert headers["x-request-id"] == "whole-1"
    usage = json.loads(content)["usage"]
    entry = line_of(server, "whole-1")
    assert set(FIELDS) | {"time", "level", "logger", "message"} == set(entry)
    assert re.fullmatch(TIME, entry["time"])
    assert (entry["level"], entry["logger"]) == ("info", "starling.serve.request")
    assert (entry["method"], entry["path"], entry["status"]) == ("POST", "/v1/completions", 200)
    assert (entry["prompt_tokens"], entry["completion_tokens"]) == (usage["prompt_tokens"], 3)
    assert (entry["finish_reason"], entry["error"], entry["error_code"]) == ("length", None, None)
    assert entry["client"] == "127.0.0.1"
    first = server.metric("vllm:time_to_first_token_seconds_sum") - before
    assert entry["ttft_ms"] == pytest.approx(first * 1e3, abs=0.06)
    assert entry["total_ms"] >= entry["ttft_ms"] > 0


def test_the_real_client_finds_the_id_of_its_request(server: Server) -> None:
    answer = server.client().completions.create(**BASE)
    assert line_of(server, str(answer._request_id))["completion_tokens"] == 3
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().completions.create(**BASE | {"temperature": -1})
    entry = line_of(server, str(caught.value.request_id))
    assert (entry["status"], entry["error_code"]) == (400, None)
    assert entry["error"].startswith("temperature is -1")
    assert entry["ttft_ms"] is None


def test_a_stream_is_logged_when_it_has_ended(server: Server) -> None:
    _, headers, content = post(server, BASE | {"stream": True}, "stream-1")
    assert headers["x-request-id"] == "stream-1"
    assert content.endswith(b"data: [DONE]\n\n")
    entry = line_of(server, "stream-1")
    assert (entry["status"], entry["completion_tokens"], entry["finish_reason"]) == (200, 3, "length")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_is_logged_as_such(server: Server, stream: bool) -> None:
    body = json.dumps(ENDLESS | {"stream": stream}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: [::1]\r\nContent-Type: application/json\r\nX-Request-ID: gone-{stream}"
    )
    with socket.create_connection(("127.0.0.1", server.port)) as plain:
        plain.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        assert wait_until(lambda: server.metric("vllm:num_requests_running") == 1, 10)
    entry = line_of(server, f"gone-{stream}")
    assert (entry["level"], entry["status"], entry["finish_reason"]) == ("info", 499, "cancelled")
    assert "went away" in entry["error"]
    assert entry["prompt_tokens"] > 0


def test_a_body_that_breaks_off_is_a_client_that_went_away(server: Server) -> None:
    head = "POST /v1/completions HTTP/1.1\r\nHost: [::1]\r\nContent-Type: application/json\r\nX-Request-ID: torn"
    with socket.create_connection(("127.0.0.1", server.port)) as plain:
        plain.sendall(f"{head}\r\nContent-Length: 100\r\n\r\n{{".encode())
    assert line_of(server, "torn")["status"] == 499


def test_a_deadline_within_a_stream_is_a_warning_with_its_reason(server: Server) -> None:
    post(server, ENDLESS | {"stream": True, "deadline_s": 0.5}, "late")
    entry = line_of(server, "late")
    assert (entry["level"], entry["status"], entry["finish_reason"]) == ("warning", 200, "deadline")
    assert (entry["error_code"], entry["completion_tokens"] > 0) == ("deadline_exceeded", True)


@pytest.mark.parametrize(
    "given",
    ["", "a b", 'a"b', "a\tb", "x" * 129, "schlüssel".encode().decode("latin-1"), "a\\b", "%0a"],
    ids=["none", "space", "quote", "tab", "long", "umlaut", "backslash", "percent"],
)
def test_an_id_that_is_not_sane_is_replaced(server: Server, given: str) -> None:
    _, headers, _ = server.request("GET", "/nothing", headers={"x-request-id": given})
    assert re.fullmatch("[0-9a-f]{32}", headers["x-request-id"])
    assert line_of(server, headers["x-request-id"])["status"] == 404


def test_every_response_has_an_id(texts: Server) -> None:
    for path in ("/health", "/ready", "/metrics", "/v1/models", "/v1/models/none", "/nothing", "/v1/completions"):
        for key in (KEY, "wrong"):
            headers = texts.request("GET", path, headers={"Authorization": f"Bearer {key}", "x-request-id": "mine/1"})[
                1
            ]
            assert headers["x-request-id"] == "mine/1", path


@pytest.mark.parametrize("value", [b"a\r\n b", b"a\rSet-Cookie: x=1", b"a" * 2**20], ids=["folded", "return", "1 MB"])
def test_a_header_that_tries_to_break_out_gets_nowhere(texts: Server, value: bytes) -> None:
    with socket.create_connection(("127.0.0.1", texts.port), timeout=10) as plain:
        try:
            plain.sendall(
                b"GET /health HTTP/1.1\r\nHost: [::1]\r\nConnection: close\r\nX-Request-ID: " + value + b"\r\n\r\n"
            )
            answer = plain.makefile("rb").read()
        except ConnectionError:  # closed on it while it still sent
            answer = b""
    assert b"Set-Cookie" not in answer
    assert value not in answer
    assert texts.request("GET", "/health")[0] == 200


HOSTILE = f'm"\\\n{"2026-01-01T00:00:00.000Z"} ERROR forged: x\r\x1b[31m\u2028\u0085\u202e\ud800 request_id=forged '


def test_a_strangers_text_never_breaks_or_forges_a_line(texts: Server) -> None:
    bodies: list[Any] = [
        BASE | {"model": HOSTILE},
        BASE | {HOSTILE: 1},
        BASE | {HOSTILE.replace("\ud800", ""): 1},
        BASE | {"x" * 100_000: 1},
        BASE | {"temperature": HOSTILE},
        b'{"model": "\n',
    ]
    for number, (body, expected) in enumerate(zip(bodies, (404, 400, 200, 200, 400, 400), strict=True)):
        status, _, _ = post(texts, body, f"hostile-{number}")
        assert status == expected
        line = text_of(texts, f"hostile-{number}")
        assert len(line) < 2 * MOST_CHARACTERS
        assert line.isprintable()
    forged = texts.request(
        "GET",
        "/x%0A2026%20ERROR%E2%80%A8%22",
        headers={"x-request-id": "path", "X-Forwarded-For": 'a" b=c', "Authorization": f"Bearer {KEY}"},
    )
    assert forged[0] == 404
    assert "GET /x%0A2026%20ERROR%E2%80%A8%22 404 " in text_of(texts, "path")
    assert all(HEAD.match(line) and "request_id=forged" not in line.split('error="')[0] for line in texts.log)


def test_secrets_are_not_logged(texts: Server) -> None:
    secret = "the patient is called Smith"
    for number, body in enumerate(
        [
            BASE | {"prompt": secret},
            BASE | {"prompt": f"{secret} " * 100},
            BASE | {"prompt": {"text": secret}},
            BASE | {"suffix": secret},
            BASE | {"stop": [secret, ""]},
            BASE | {"user": secret, "temperature": -1},
        ]
    ):
        post(texts, body, f"secret-{number}")
        text_of(texts, f"secret-{number}")
    chats: list[Any] = [
        secret,
        [{"role": "user", "content": secret, "name": [secret]}],
        [{"content": secret}],
        [secret],
    ]
    for number, messages in enumerate(chats):
        body = {"model": MODEL, "max_tokens": 1, "messages": messages, "tools": None if number else [secret]}
        headers = {"Authorization": f"Bearer {KEY}", "x-request-id": f"chat-{number}"}
        texts.request("POST", f"/v1/chat/completions?key={KEY}", body, headers)
        text_of(texts, f"chat-{number}")
    texts.request("GET", "/v1/models", headers={"Authorization": "Bearer sk-a-wrong-one", "x-request-id": "wrong"})
    assert " 401 " in text_of(texts, "wrong")
    assert not [line for line in texts.log if "Smith" in line or KEY in line or "sk-a-wrong" in line]


def test_probes_are_logged_at_debug_only(server: Server, texts: Server) -> None:
    for path in ("/health", "/ready", "/metrics"):
        texts.request("GET", path, headers={"x-request-id": f"probe{path}"})
        assert " DEBUG starling.serve.request: GET " in text_of(texts, f"probe{path}")
        server.request("GET", path, headers={"x-request-id": "probe"})
    server.request("GET", "/v1/models", headers={"x-request-id": "after-probes"})
    line_of(server, "after-probes")
    assert not any('"probe"' in line for line in server.log)


def test_fifty_requests_at_once_are_fifty_whole_lines(server: Server) -> None:
    def ask(number: int) -> None:
        bad: dict[str, Any] = [{}, {"stream": True}, {"top_p": 7}, {"model": HOSTILE}, {"stream": True, "suffix": "x"}][
            number % 5
        ]
        post(server, BASE | bad, f"many-{number}")

    with ThreadPoolExecutor(50) as pool:
        list(pool.map(ask, range(50)))
    entries = [line_of(server, f"many-{number}") for number in range(50)]
    assert [entry["status"] for entry in entries] == [200, 200, 400, 404, 400] * 10
    assert all(isinstance(json.loads(line), dict) for line in server.log)


def test_the_start_says_how_requests_are_sampled_and_the_level_is_kept(tiny_bundle: Path, server: Server) -> None:
    messages = [json.loads(line)["message"] for line in server.log]
    assert any("sampled at 1; send 0" in message for message in messages)
    with serving_silently(tiny_bundle, "--log-level", "error") as (process, port):
        assert answers(port)
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=30)[1] == b""


def test_an_end_while_a_stream_runs_is_logged(tiny_bundle: Path) -> None:
    with serving(tiny_bundle, "--max-seq", "8192", "--grace", "0.5", "--log-format", "json") as ending:
        stream = iter(ending.client().completions.create(model=MODEL, prompt=PROMPT, max_tokens=8000, stream=True))
        next(stream)
        ending.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert ending.process.wait(timeout=30) == 0
        assert wait_until(lambda: "Finished server process" in ending.log[-1], 10)
    [entry] = [entry for entry in map(json.loads, ending.log) if entry.get("status")]
    assert (entry["level"], entry["status"], entry["finish_reason"]) == ("warning", 200, "cancelled")
    assert entry["error_code"] == "shutting_down"


def test_a_failure_of_the_engine_is_logged_under_the_requests_id_and_not_told(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    broken = copy_bundle(tiny_bundle, tmp_path / "broken")
    replace_file(broken / "model.onnx.data", b"\xff" * (tiny_bundle / "model.onnx.data").stat().st_size)
    with serving(broken, "--max-seq", "64", "--log-format", "json") as server:
        for stream in (False, True):
            status, _, content = post(server, BASE | {"stream": stream}, f"broken-{stream}")
            message = json.loads(content)["error"]["message"]
            assert status == 500
            assert message == f"an unexpected failure; the server's log has it under the request id broken-{stream}"
            entry = line_of(server, f"broken-{stream}")
            assert (entry["level"], entry["status"], entry["finish_reason"]) == ("error", 500, "failed")
            assert (
                f"request broken-{stream} failed after 0 token(s): the model's greatest logit is nan" in entry["error"]
            )
            assert entry["traceback"].startswith("Traceback")
            assert "BackendError" in entry["traceback"]
        assert server.metric("vllm:request_prompt_tokens_count") == 2


@pytest.fixture(scope="module")
def service(tiny_bundle: Path) -> Iterator[Service]:
    with Engine(tiny_bundle, max_seq=64, threads=2) as engine, ServingLoop(engine) as loop:
        yield Service(engine, loop, Limits(models=(MODEL,), max_seq=64, max_prompt=64))


def call(app: Any, path: str, body: bytes = b"") -> list[dict[str, Any]]:
    """What an application sends for one request, without a network."""
    sent: list[dict[str, Any]] = []
    headers = [(b"content-type", b"application/json"), (b"x-request-id", b"in-process")]
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers, "client": None}

    async def run() -> None:
        received = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> dict[str, Any]:
            return next(received, None) or await asyncio.Event().wait()  # type: ignore[return-value]

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await app(scope, receive, send)
        while len(asyncio.all_tasks()) > 1:  # what goes on after the answer, as in a server
            await asyncio.sleep(0.01)

    asyncio.run(run())
    return sent


class Unforeseen(CompletionReply):
    """A reply that fails at its third piece, with words that try to leave the log's lines."""

    pieces = 0

    def chunk(self, *arguments: Any) -> dict[str, Any]:
        self.pieces += 1
        if self.pieces == 3:
            raise ValueError("secret path /etc/x\n2026-01-01T00:00:00.000Z ERROR forged: line")
        return super().chunk(*arguments)

    def whole(self, *arguments: Any) -> dict[str, Any]:
        raise ValueError("secret path /etc/x\n2026-01-01T00:00:00.000Z ERROR forged: line")


@pytest.mark.parametrize("stream", [True, False])
def test_an_unforeseen_exception_is_a_500_without_its_words_and_a_traceback_in_the_log(
    service: Service, capfd: pytest.CaptureFixture[str], stream: bool
) -> None:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.routing import Route

    from starling.serving.http.app import _failed

    async def endpoint(request: Request) -> Answer:
        document = await request.json()
        submitted = await service.start(
            lambda: completion_request(document, service.limits), request_trace(request.scope).id
        )
        reply = Unforeseen(MODEL, service.texts, stream=stream, with_usage=False)
        return Answer(service, submitted, reply)

    app = Starlette(routes=[Route("/x", endpoint, methods=["POST"])], exception_handlers={Exception: _failed})
    before = _figures(service)
    with configured("text"):
        sent = call(RequestLog(app), "/x", json.dumps(BASE | {"max_tokens": 9, "stream": stream}).encode())
    # Nobody read the request to its end; it is counted all the same, everywhere.
    assert [after - figure for after, figure in zip(_figures(service), before, strict=True)] == [1, 1]
    body = b"".join(message.get("body", b"") for message in sent)
    assert sent[0]["status"] == (200 if stream else 500)
    assert b"secret" not in body
    assert b"the server's log has it under the request id in-process" in body
    assert body.endswith(b"data: [DONE]\n\n") == stream
    lines = capfd.readouterr().err.splitlines()
    assert " ERROR starling.serve.request: POST /x " in lines[0]
    assert "request_id=in-process" in lines[0]
    assert "    Traceback (most recent call last):" in lines
    assert "    ValueError: secret path /etc/x" in lines
    assert all(line.startswith("    ") for line in lines[1:])


def _figures(service: Service) -> list[float]:
    """Ended requests, by the counter and by a histogram."""
    lines = service.metrics.export().decode().splitlines()
    names = ("vllm:request_success_total", "vllm:request_generation_tokens_count")
    return [sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name)) for name in names]


def test_an_embedded_application_logs_through_whatever_logging_is_set_up(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(Served(service, None), max_body=1000)
    with caplog.at_level("INFO", logger="starling.serve"):
        assert call(app, "/v1/completions", b"{}")[0]["status"] == 400
    [record] = caplog.records
    assert (record.name, record.getMessage()) == ("starling.serve.request", "POST /v1/completions 400")


class configured:
    """`configure_logging` for a block, in this process."""

    def __init__(self, layout: str) -> None:
        self._layout = layout

    def __enter__(self) -> None:
        import logging

        root = logging.getLogger()
        self._before = root.level, root.handlers[:]
        configure_logging("info", self._layout)

    def __exit__(self, *_: object) -> None:
        import logging

        root = logging.getLogger()
        root.setLevel(self._before[0])
        root.handlers[:] = self._before[1]


class serving_silently:
    """A server whose stderr this test reads or not; a port of our choice, since nothing may say it."""

    def __init__(self, bundle: Path, *options: str, shell: str = 'exec "$@"') -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = starling_command("serve", bundle, "--port", str(self.port), "--model-name", MODEL, "--max-seq", "64")
        self.process = subprocess.Popen(["bash", "-c", shell, "bash", *command, *options], stderr=subprocess.PIPE)

    def __enter__(self) -> tuple[subprocess.Popen[bytes], int]:
        assert wait_until(lambda: answers(self.port), 60)
        return self.process, self.port

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def answers(port: int) -> bool:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("POST", "/v1/completions", json.dumps(BASE), {"Content-Type": "application/json"})
        return connection.getresponse().status == 200
    except ConnectionError:
        return False
    finally:
        connection.close()


def refusals(port: int, count: int) -> None:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    for _ in range(count):
        connection.request(
            "POST", "/v1/completions", b'{"' + b"x" * 600 + b'": 1}', {"Content-Type": "application/json"}
        )
        connection.getresponse().read()
    connection.close()


def test_a_reader_of_stderr_that_stands_still_stops_nothing_and_hears_what_it_missed(tiny_bundle: Path) -> None:
    with serving_silently(tiny_bundle) as (process, port):
        refusals(port, 300)  # more than a pipe holds
        assert answers(port)
        assert process.stderr is not None
        os.set_blocking(process.stderr.fileno(), False)
        missed = process.stderr.read()
        assert 50_000 < len(missed) < 70_000
        assert answers(port)
        assert wait_until(lambda: (more := process.stderr.read()) and b"line(s) of the log were dropped" in more, 5)  # type: ignore[union-attr]
        lines = missed.decode().splitlines()
        assert all(HEAD.match(line) for line in lines[:-1])
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0


@pytest.mark.parametrize(
    "shell", ['exec "$@" 2>&-', 'exec "$@" 2>/dev/full', 'exec "$@" 2> >(exit)'], ids=["closed", "full", "gone"]
)
def test_a_server_without_stderr_answers_and_ends_well(tiny_bundle: Path, shell: str) -> None:
    with serving_silently(tiny_bundle, shell=shell) as (process, port):
        refusals(port, 20)
        assert answers(port)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
