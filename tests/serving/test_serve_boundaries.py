"""Who may use a server, and what no client can do to the others: names, origins, keys, ports, signals."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from command_line import refusal, starling, starling_command
from http_server import MODEL, Server, serving, wait_until
from raw_http import body_of, exchange, request, status_of
from triton_server import free_ports

pytestmark = pytest.mark.slow

BASE: dict[str, Any] = {"model": MODEL, "prompt": "Once", "max_tokens": 2}
COMPLETIONS = "/v1/completions"
FIT = ("--max-seq", "64")
ORIGIN = "https://app.example.com"
LONG: dict[str, Any] = {**BASE, "max_tokens": 300, "stream": True, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[Server]:
    with serving(tiny_bundle, *FIT) as running:
        yield running


@pytest.fixture(scope="module")
def named(tiny_bundle: Path) -> Iterator[Server]:
    options = ("--allowed-host", "Model.example.com", "--allowed-host", "*.inner.example", "--allow-origin", ORIGIN)
    with serving(tiny_bundle, *FIT, *options, env={"STARLING_API_KEY": "key"}) as running:
        yield running


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/models", "/metrics", "/health", "/nothing"])
def test_a_page_whose_name_was_made_to_point_here_gets_nothing(server: Server, path: str) -> None:
    for host in (
        "evil.example",
        f"evil.example:{server.port}",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "",
        "a b",
    ):
        answer = exchange(
            server.port, request(path, BASE if path == COMPLETIONS else None, host=host, Origin="http://x")
        )
        error = json.loads(body_of(answer))["error"]
        assert (status_of(answer), error["code"]) == (403, "host_not_allowed"), host
        assert "--allowed-host" in error["message"]
    for host in (
        "localhost",
        f"LOCALHOST:{server.port}",
        f"127.0.0.1:{server.port}",
        "[::1]:80",
        "10.1.2.3:8000",
    ):
        assert status_of(exchange(server.port, request("/health", host=host))) == 200, host


def test_other_names_are_those_of_the_operator(named: Server) -> None:
    for host in ("model.example.com", "MODEL.example.com:443", "a.inner.example", "a.b.inner.example", "127.0.0.1"):
        assert status_of(exchange(named.port, request("/health", host=host))) == 200, host
    for host in ("inner.example", "xinner.example", "model.example.com.evil", "evil.example"):
        assert status_of(exchange(named.port, request("/health", host=host))) == 403, host


def test_pages_of_other_sites_read_nothing_unless_they_are_named(server: Server, named: Server) -> None:
    asked = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization,content-type"}
    for running, origin, allowed in (
        (server, ORIGIN, False),
        (named, "https://evil.example", False),
        (named, ORIGIN, True),
    ):
        preflight = exchange(running.port, request(COMPLETIONS, method="OPTIONS", Origin=origin, **asked))
        answer = exchange(running.port, request(COMPLETIONS, BASE, Origin=origin, Authorization="Bearer key"))
        for one in (preflight, answer):
            assert (f"access-control-allow-origin: {origin}".encode() in one.lower()) is allowed, one
        assert (status_of(preflight) == 200) is allowed
    assert status_of(exchange(named.port, request(COMPLETIONS, BASE, Origin=ORIGIN))) == 401


def test_patterns_that_are_none_are_refused(tiny_bundle: Path) -> None:
    for option, value in (
        *(("--allowed-host", name) for name in ("http://a.example", "a.*.example", "", "a b")),
        *(("--allow-origin", name) for name in ("app.example.com", "https://a.example/path", "", "*.example")),
    ):
        assert option in refusal("serve", tiny_bundle, option, value)


def test_a_key_is_compared_byte_by_byte_as_it_stands_in_its_file(tiny_bundle: Path, tmp_path: Path) -> None:
    # In UTF-8 they end in the bytes A0 and 85, and hold 85 and A8: white space and line ends of a text.
    keys = ["keyà", "Å", "a\u0085b", "\u2028c", "two words"]
    file = tmp_path / "keys"
    file.write_bytes("".join(f"\t{key} \r\n" for key in keys).encode())
    with serving(tiny_bundle, *FIT, "--api-key-file", file) as guarded:
        for key in keys:
            raw = key.encode().decode("latin-1")
            for sent in (raw, f" {raw}", f"{raw} \t"):
                assert (
                    status_of(exchange(guarded.port, request("/v1/models", Authorization=f"Bearer {sent}"))) == 200
                ), key
            for wrong in (raw[:-1], raw + "x", raw + "\xa0", raw + "\x85"):
                assert status_of(exchange(guarded.port, request("/v1/models", Authorization=f"Bearer {wrong}"))) == 401
        assert any("can be read by every user" in line for line in guarded.log)
    with serving(tiny_bundle, *FIT, env={"STARLING_API_KEY": "keyà"}) as guarded:
        raw = "keyà".encode().decode("latin-1")
        assert status_of(exchange(guarded.port, request("/v1/models", Authorization=f"Bearer {raw}"))) == 200


@pytest.mark.parametrize(
    ("mode", "refused"), [(0o666, True), (0o602, True), (0o644, False), (0o600, False), (0o440, False)]
)
def test_a_file_of_keys_that_anyone_may_write_to_is_refused(
    tiny_bundle: Path, tmp_path: Path, server: Server, mode: int, refused: bool
) -> None:
    file = tmp_path / "keys"
    file.write_text("key\n")
    file.chmod(mode)
    # A port that is taken ends the others before a model is loaded.
    finished = starling("serve", tiny_bundle, "--api-key-file", file, "--port", str(server.port))
    assert finished.returncode == (2 if refused else 1)
    assert ("choose another --port" in finished.stderr) is not refused
    assert ("chmod 600" in finished.stderr) is bool(mode & 0o006)


def test_of_two_servers_on_one_port_the_second_ends_before_it_loads_a_model(tiny_bundle: Path, tmp_path: Path) -> None:
    [port] = free_ports(1)
    processes = [_started(tiny_bundle, "--port", str(port), "--max-seq", "64") for _ in range(2)]
    try:
        assert wait_until(lambda: any(process.poll() is not None for process in processes), 60)
        [ended] = [process for process in processes if process.poll() is not None]
        assert ended.returncode == 1
        assert b"choose another --port" in ended.communicate()[1]
        assert wait_until(lambda: _status(port, "/ready") == 200, 60)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_sighup_finishes_what_runs_as_sigterm_does(tiny_bundle: Path) -> None:
    with serving(tiny_bundle, "--max-seq", "1024", "--grace", "60") as ending:
        answer = ending.client().completions.create(**LONG)
        stream = iter(answer)
        next(stream)
        ending.process.send_signal(signal.SIGHUP)
        ending.process.send_signal(signal.SIGHUP)
        assert [*stream][-1].choices[0].finish_reason == "length"
        assert ending.process.wait(60) == 0
        assert not any("Traceback" in line for line in ending.log)


def test_a_stderr_that_takes_nothing_does_not_end_the_server(tiny_bundle: Path) -> None:
    [port] = free_ports(1)
    with Path("/dev/full").open("w") as full:
        process = _started(tiny_bundle, "--port", str(port), "--max-seq", "64", stderr=full)
        try:
            assert wait_until(lambda: _status(port, "/ready") == 200, 60)
            assert status_of(exchange(port, request(COMPLETIONS, BASE | {"temperature": "x"}))) == 400
            assert status_of(exchange(port, request(COMPLETIONS, BASE))) == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_at_any_moment_of_the_start_is_one_line_at_most(tiny_bundle: Path, number: signal.Signals) -> None:
    own = 0
    for wait in (0.05, 0.15, 0.3, 0.6, 1.2):
        process = _started(tiny_bundle, "--port", "0", "--max-seq", "64")
        time.sleep(wait)
        process.send_signal(number)
        output, said = process.communicate(timeout=60)
        if b"cli/main.py" not in said and (b"Traceback" in said or b"Fatal Python" in said):
            continue  # no line of the program has run: this is the interpreter's own way to end
        own += 1
        assert b"Traceback" not in said, said
        assert b"Exception" not in said
        assert b"not installed" not in said
        assert output == b""
        assert process.returncode in (-number, 128 + number, 0), said
    assert own >= 1


def test_health_answers_while_long_texts_are_refused(server: Server) -> None:
    text = "hello world " * 86_000
    bodies = [
        {"prompt": text},
        {"prompt": "a" * 1_040_000},
        {"prompt": [5] * 200_000},
        {"stop_token_ids": [5] * 200_000},
    ]
    chats = [
        {"messages": [{"role": "user", "content": text}]},
        {"messages": [{"role": "user", "content": ""}] * 20_000},
    ]
    asked = [request(COMPLETIONS, BASE | body) for body in bodies] + [
        request("/v1/chat/completions", {"model": MODEL, "max_tokens": 2} | chat) for chat in chats
    ]
    refused = {status_of(exchange(server.port, one)) for one in asked}
    assert refused <= {200, 400}
    before = server.metric("process_resident_memory_bytes")
    with ThreadPoolExecutor(24) as pool:
        asking = [pool.submit(exchange, server.port, asked[0]) for _ in range(24)]
        while not all(one.done() for one in asking):
            begin = time.monotonic()
            assert _status(server.port, "/health") == 200
            assert time.monotonic() - begin < 10
        answers = [one.result() for one in asking]
        assert {json.loads(body_of(answer))["error"]["code"] for answer in answers} == {"context_length_exceeded"}
    assert server.metric("process_resident_memory_bytes") - before < 150e6


def _started(bundle: Path, *options: str, stderr: Any = subprocess.PIPE) -> subprocess.Popen[bytes]:
    command = starling_command("serve", bundle, "--model-name", MODEL, "--threads", "1", *options)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr)


def _status(port: int, path: str) -> int:
    try:
        return status_of(exchange(port, request(path)))
    except ConnectionRefusedError:
        return 0
