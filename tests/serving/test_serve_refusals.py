"""`starling serve` says no by name, keeps its limits, and ends as it should."""

import json
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from command_line import install_hint, python_without, refusal, starling
from http_server import MODEL, Server, serving, wait_until

pytestmark = pytest.mark.slow

PROMPT = "Once upon a time"
#: Answers that take seconds, since nothing ends them before the cache does.
LONG: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4000, "extra_body": {"ignore_eos": True}}
LIMITS = ("--max-batch", "2", "--max-queue", "1", "--max-seq", "4096", "--max-prompt", "64", "--max-body", "20000")


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[Server]:
    with serving(tiny_bundle, *LIMITS) as running:
        yield running


BASE: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 2}
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
SCHEMA, MANNER = "response_format.json_schema.schema", "structured_outputs.disable_additional_properties"
BAD: list[tuple[dict[str, Any], dict[str, Any], int, str | None]] = [
    (BASE, {"model": 5}, 400, "model"),
    (BASE, {"model": "gpt-4"}, 404, "model"),
    (BASE, {"prompt": None}, 400, "prompt"),
    (BASE, {"prompt": ""}, 400, "prompt"),
    (BASE, {"prompt": ["a", "b", "c", "d"]}, 400, "prompt"),
    (BASE, {"prompt": [10**9]}, 400, "prompt"),
    (BASE, {"prompt": "\ud800"}, 400, "prompt"),
    (BASE, {"prompt": "word " * 100}, 400, "prompt"),
    (BASE, {"n": 129}, 400, "n"),
    (BASE, {"n": 2, "best_of": 1}, 400, "best_of"),
    (BASE, {"best_of": 2, "stream": True}, 400, "best_of"),
    (BASE, {"prompt": ["Hi", 5]}, 400, "prompt"),
    (BASE, {"prompt": ["a", "b"], "n": 2}, 400, "prompt"),
    (BASE, {"max_tokens": -1}, 400, "max_tokens"),
    (BASE, {"max_tokens": "8"}, 400, "max_tokens"),
    (BASE, {"max_tokens": True}, 400, "max_tokens"),
    (BASE, {"temperature": -0.5}, 400, "temperature"),
    (BASE, {"temperature": float("nan")}, 400, "temperature"),
    (BASE, {"temperature": 10**400}, 400, "temperature"),
    (BASE, {"temperature": "\ud800"}, 400, "temperature"),
    (BASE, {"top_p": 0}, 400, "top_p"),
    (BASE, {"top_k": -2}, 400, "top_k"),
    (BASE, {"seed": -2}, 400, "seed"),
    (BASE, {"stop": ""}, 400, "stop"),
    (BASE, {"stop": ["a"] * 65}, 400, "stop"),
    (BASE, {"logprobs": 21}, 400, "logprobs"),
    (BASE, {"echo": "yes"}, 400, "echo"),
    (BASE, {"presence_penalty": 2.5}, 400, "presence_penalty"),
    (BASE, {"frequency_penalty": -3}, 400, "frequency_penalty"),
    (BASE, {"logit_bias": {"5": 101}}, 400, "logit_bias"),
    (BASE, {"logit_bias": {"five": 1}}, 400, "logit_bias"),
    (BASE, {"logit_bias": {"32002": 1}}, 400, "logit_bias"),
    (BASE, {"logit_bias": {"5": "1"}}, 400, "logit_bias"),
    (BASE, {"bad_words": [" "]}, 400, "bad_words"),
    (BASE, {"min_tokens": 3}, 400, "min_tokens"),
    (BASE, {"use_beam_search": True}, 400, "use_beam_search"),
    (CHAT, {"chat_template_kwargs": {"messages": []}}, 400, "chat_template_kwargs"),
    (CHAT, {"chat_template_kwargs": {"bos_token": "x"}}, 400, "chat_template_kwargs"),
    (CHAT, {"chat_template_kwargs": {"deep": [[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]}}, 400, "chat_template_kwargs"),
    (CHAT, {"reasoning_effort": 1}, 400, "reasoning_effort"),
    (CHAT, {"verbosity": "low"}, 400, "verbosity"),
    (BASE, {"max_token": 1}, 400, "max_token"),
    (BASE, {"max_new_tokens": 1}, 400, "max_new_tokens"),
    (BASE, {"stream": "yes"}, 400, "stream"),
    (BASE, {"stream_options": {"include_usage": True}}, 400, "stream_options"),
    (BASE, {"temprature": 1}, 400, "temprature"),
    (BASE, {"deadline_s": 0}, 400, "deadline_s"),
    (BASE, {"deadline_s": 10**400}, 400, "deadline_s"),
    (CHAT, {"messages": []}, 400, "messages"),
    (CHAT, {"messages": [{"role": "robot", "content": "Hi"}]}, 400, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content[0]"),
    (CHAT, {"tools": [{"type": "function"}]}, 400, "tools[0].function"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
    (CHAT, {"functions": [{"name": "f"}]}, 400, "functions"),
    (CHAT, {"response_format": {"type": "xml"}}, 400, "response_format.type"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": 5}}, 400, "response_format.json_schema"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, 400, SCHEMA),
    (CHAT, {"response_format": {"type": "json_object"}, "guided_regex": "a"}, 400, "response_format"),
    (BASE, {"structured_outputs": {"json": {}, "choice": ["a"]}}, 400, "structured_outputs.choice"),
    (BASE, {"structured_outputs": {"regex": "("}}, 400, "structured_outputs.regex"),
    (BASE, {"structured_outputs": {"disable_additional_properties": True}}, 400, MANNER),
    (BASE, {"guided_json": "{"}, 400, "guided_json"),
    (BASE, {"guided_json": {"$ref": "https://example.org/x.json"}}, 400, "guided_json"),
    (BASE, {"guided_choice": "yes"}, 400, "guided_choice"),
    (BASE, {"guided_grammar": "start: other"}, 400, "guided_grammar"),
    (BASE, {"guided_choice": [" x"], "bad_words": ["x"]}, 400, None),
    (CHAT, {"top_logprobs": 2}, 400, "top_logprobs"),
    (CHAT, {"template": "none"}, 400, "template"),
]


@pytest.mark.parametrize(("base", "change", "status", "field"), BAD, ids=lambda value: str(value)[:30])
def test_a_bad_field_is_named(
    server: Server, base: dict[str, Any], change: dict[str, Any], status: int, field: str | None
) -> None:
    path = "/v1/completions" if "prompt" in base else "/v1/chat/completions"
    got, _, body = server.request("POST", path, base | change)
    error = json.loads(body)["error"]
    assert (got, error["param"]) == (status, field), error
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]


def test_fields_that_change_nothing_are_accepted(server: Server) -> None:
    same: dict[str, Any] = {
        "n": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "echo": False,
        "user": "me",
    }
    assert server.request("POST", "/v1/completions", BASE | same)[0] == 200
    extensions = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "max_completion_tokens": 3}
    assert server.request("POST", "/v1/chat/completions", CHAT | extensions)[0] == 200


def test_fields_that_nobody_knows_are_named_in_a_header(server: Server) -> None:
    unknown = {"request_id": "x", "vllm_xargs": {"a": 1}, "two\r\nlines": 1, "é" * 100: 1}
    status, headers, _ = server.request("POST", "/v1/completions", BASE | unknown)
    assert status == 200
    assert headers["x-starling-ignored"] == "request_id, vllm_xargs, two??lines, " + "?" * 64
    status, headers, _ = server.request("POST", "/v1/chat/completions", CHAT | {"stream": True, "request_id": "x"})
    assert (status, headers["x-starling-ignored"]) == (200, "request_id")
    nameless = server.request("POST", "/v1/completions", BASE | {"vllm_xargs": 1, "": 1})
    assert (nameless[0], nameless[1]["x-starling-ignored"]) == (200, 'vllm_xargs, ""')
    many = {f"zz{number}zz": number for number in range(30)}
    assert server.request("POST", "/v1/completions", BASE | many)[1]["x-starling-ignored"].endswith("zz15zz, 14 more")
    assert "x-starling-ignored" not in server.request("POST", "/v1/completions", BASE)[1]
    assert any("ignored=" in line and "vllm_xargs" in line for line in server.log)


@pytest.mark.parametrize("name", ["half \ud800 of a pair", "\udc00", "x" * 100 + "\ud83d"])
def test_a_field_whose_name_is_no_text_is_refused(server: Server, name: str) -> None:
    status, _, body = server.request("POST", "/v1/completions", BASE | {name: 1})
    error = json.loads(body)["error"]
    assert (status, error["code"]) == (400, "unknown_parameter")
    assert error["param"] == name[:60].replace("\ud800", "?").replace("\udc00", "?")


def test_a_strict_server_refuses_them(tiny_bundle: Path) -> None:
    with serving(tiny_bundle, "--max-seq", "64", "--strict") as strict:
        for name in ("request_id", "half \ud800 of a pair"):
            status, _, body = strict.request("POST", "/v1/completions", BASE | {name: 1})
            error = json.loads(body)["error"]
            assert (status, error["code"]) == (400, "unknown_parameter")
            assert error["param"] == name.replace("\ud800", "?")


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("POST", "/v1/completions", b"{", {}, 400),
        ("POST", "/v1/completions", b"[]", {}, 400),
        ("POST", "/v1/completions", b"[" * 19000, {}, 400),
        ("POST", "/v1/completions", b"\xff\xfe", {}, 400),
        ("POST", "/v1/completions", b"{}", {"Content-Type": "text/plain"}, 415),
        ("POST", "/v1/completions", b"x" * 20001, {}, 413),
        ("POST", "/v1/completions", b"x" * 5_000_000, {}, 413),
        ("GET", "/v1/completions", None, {}, 405),
        ("GET", "/v1/models/other", None, {}, 404),
        ("GET", "/nothing", None, {}, 404),
    ],
    ids=["torn", "list", "deep", "bytes", "form", "one byte more", "far too large", "GET", "model", "path"],
)
def test_what_is_no_request_is_refused(
    server: Server, method: str, path: str, body: bytes | None, headers: dict[str, str], status: int
) -> None:
    got, _, content = server.request(method, path, body, headers)
    assert got == status
    assert set(json.loads(content)["error"]) == {"message", "type", "param", "code"}


def test_the_real_client_raises_its_own_errors(server: Server) -> None:
    client = server.client()
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'"):
        client.completions.create(model="gpt-4", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError, match="takes 64") as caught:
        client.completions.create(model=MODEL, prompt="word " * 100)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.InternalServerError, match=r"deadline_s was 0\.3") as late:
        client.completions.create(**LONG | {"extra_body": {"ignore_eos": True, "deadline_s": 0.3}})
    assert late.value.status_code == 504


def test_a_full_queue_is_refused_with_retry_after_and_nobody_suffers(server: Server) -> None:
    settings = LONG | {"max_tokens": 400, "temperature": 0}

    def answer(_: int) -> str | tuple[int, str]:
        try:
            return server.client().completions.create(**settings).choices[0].text
        except openai.RateLimitError as error:
            return error.status_code, error.response.headers["retry-after"]

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(answer, range(10)))
    texts = [text for text in answers if isinstance(text, str)]
    assert answers.count((429, "1")) == 10 - len(texts) > 0
    assert len(texts) >= 3
    assert set(texts) == {texts[0]}
    assert server.metric("vllm:num_requests_running") == 0


def test_a_client_that_goes_away_frees_its_row(server: Server) -> None:
    aborted = server.metric("vllm:request_success_total", finished_reason="abort")
    stream = server.client().completions.create(**LONG, stream=True)
    next(iter(stream))
    assert server.metric("vllm:num_requests_running") == 1
    stream.close()
    assert wait_until(lambda: server.metric("vllm:num_requests_running") == 0, 2)
    assert server.metric("vllm:request_success_total", finished_reason="abort") == aborted + 1

    body = json.dumps(BASE | {"max_tokens": 4000, "ignore_eos": True}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: [::1]\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    )
    with socket.create_connection(("127.0.0.1", server.port)) as plain:
        plain.sendall(head.encode() + b"\r\n\r\n" + body)
        assert wait_until(lambda: server.metric("vllm:num_requests_running") == 1, 5)
    assert wait_until(lambda: server.metric("vllm:num_requests_running") == 0, 2)
    assert server.metric("vllm:request_success_total", finished_reason="abort") == aborted + 2


def test_keys_are_asked_for_where_they_are_set(tiny_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("first-key\n\nsecond-key\n")
    with serving(tiny_bundle, "--max-seq", "64", "--api-key-file", file, env={"STARLING_API_KEY": "unused"}) as guarded:
        for key in ("first-key", "second-key"):
            assert guarded.client(key).models.list().data[0].id == MODEL
        for key in ("first-ke", "first-keys", "unused", "schlüssel".encode().decode("latin-1")):
            assert guarded.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})[0] == 401
        assert guarded.request("POST", "/v1/completions", BASE)[0] == 401
        assert guarded.request("GET", "/v1/models", headers={"Authorization": "first-key"})[0] == 401
        with pytest.raises(openai.AuthenticationError):
            guarded.client("wrong").models.list()
        assert guarded.request("GET", "/health")[0] == guarded.request("GET", "/ready")[0] == 200
    with serving(tiny_bundle, "--max-seq", "64", env={"STARLING_API_KEY": "secret"}) as guarded:
        assert guarded.request("GET", "/v1/models", headers={"Authorization": "Bearer secret"})[0] == 200
        assert guarded.request("GET", "/v1/models")[0] == 401


def test_what_cannot_be_served_is_one_line(tiny_bundle: Path, tmp_path: Path, server: Server) -> None:
    empty = tmp_path / "empty"
    empty.write_text("\n")
    assert "has no key" in refusal("serve", tiny_bundle, "--api-key-file", empty)
    assert "cannot be read" in refusal("serve", tiny_bundle, "--api-key-file", tmp_path / "none")
    assert "set but empty" in refusal("serve", tiny_bundle, env={"STARLING_API_KEY": " "})
    assert "choose another --port" in refusal("serve", tiny_bundle, "--port", str(server.port), code=1)
    assert "is no address" in refusal("serve", tiny_bundle, "--host", "no.such.host.invalid", code=1)
    assert "no such folder" in refusal("serve", tmp_path / "bundle", "--port", "0")


def test_without_its_packages_it_says_what_to_install(tiny_bundle: Path, tmp_path: Path) -> None:
    python = python_without(tmp_path / "bare", "starlette", "uvicorn")
    assert install_hint("serve") in refusal("serve", tiny_bundle, code=1, python=python)
    assert f"serve: needs starlette, uvicorn: {install_hint('serve')}" in starling("doctor", python=python).stdout


def test_a_killed_server_can_start_again_on_its_port(tiny_bundle: Path) -> None:
    with serving(tiny_bundle, "--max-seq", "4096") as first:
        port = first.port
        stream = first.client().completions.create(**LONG, stream=True)
        next(iter(stream))
        assert first.end(signal.SIGKILL) == -signal.SIGKILL
        with pytest.raises(Exception, match=r"(?i)incomplete|closed|connection"):
            list(stream)
    with serving(tiny_bundle, "--max-seq", "64", "--port", str(port)) as second:
        assert second.request("POST", "/v1/completions", BASE)[0] == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_shutdown_finishes_what_runs(tiny_bundle: Path, number: signal.Signals) -> None:
    with serving(tiny_bundle, "--max-seq", "1024", "--grace", "60") as ending:
        stream = iter(ending.client().completions.create(**LONG | {"max_tokens": 300}, stream=True))
        chunks = [next(stream)]
        ending.process.send_signal(number)
        assert wait_until(lambda: not _listens(ending.port), 5)
        chunks += stream
        assert chunks[-1].choices[0].finish_reason == "length"
        assert ending.process.wait(timeout=60) == 0
        assert wait_until(lambda: "Finished server process" in ending.log[-1], 10)
        assert all(" INFO " in line for line in ending.log), ending.log
        assert [line.partition("finish_reason=")[2] for line in ending.log if "completion" in line] == ["length"]


def test_a_shutdown_cuts_off_what_takes_longer_than_the_grace(tiny_bundle: Path) -> None:
    with serving(tiny_bundle, "--max-seq", "8192", "--grace", "0.5") as ending:
        stream = iter(ending.client().completions.create(**LONG | {"max_tokens": 8000}, stream=True))
        next(stream)
        begin = time.monotonic()
        ending.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert ending.process.wait(timeout=30) == 0
        assert time.monotonic() - begin < 5


def test_a_second_signal_ends_at_once(tiny_bundle: Path) -> None:
    with serving(tiny_bundle, "--max-seq", "8192") as ending:
        stream = iter(ending.client().completions.create(**LONG | {"max_tokens": 8000}, stream=True))
        next(stream)
        ending.process.send_signal(signal.SIGTERM)
        assert wait_until(lambda: not _listens(ending.port), 5)
        begin = time.monotonic()
        assert ending.end(signal.SIGTERM) == 128 + signal.SIGTERM
        assert time.monotonic() - begin < 2


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
