"""docs/http.md is true: its tables are the code's own, and what they claim holds on a running server."""

import json
import re
import socket
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any, get_type_hints

import openai
import pytest
from click.testing import CliRunner
from http_server import MODEL, Server, serving
from openai.types import completion_create_params as completion_fields
from openai.types.chat import completion_create_params as chat_fields

from starling.cli.serve import command as serve_command
from starling.engine.generation import sampling_params
from starling.engine.generation.sampling_params import SamplingParams
from starling.engine.text import template_renderer
from starling.serving.api import api_errors as errors
from starling.serving.api import sampling_fields
from starling.serving.api.fields import Unsupported
from starling.serving.http import body, connections, logs, request_log
from starling.serving.http import request_bodies as requests
from starling.serving.http.app import _Endpoints
from starling.serving.http.scoring_endpoints import ScoringEndpoints
from starling.serving.http.token_endpoints import TokenEndpoints
from starling.serving.metrics.metric_table import REQUEST_METRICS, STATE_METRICS

PAGE = (Path(__file__).parents[2] / "docs" / "http.md").read_text(encoding="utf-8")
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
KNOWN = {"completions": requests.COMPLETION_FIELDS, "chat": requests.CHAT_FIELDS}
IGNORED = {"completions": sampling_fields.IGNORED_FIELDS, "chat": sampling_fields.IGNORED_FIELDS}
REFUSED: dict[str, Unsupported] = {
    "completions": {**sampling_fields.UNSUPPORTED_SAMPLING, **requests.UNSUPPORTED_COMPLETION},
    "chat": {**sampling_fields.UNSUPPORTED_SAMPLING, **requests.UNSUPPORTED_CHAT},
}
#: Further settings with a number as default.
COUNTED = ("presence_penalty", "frequency_penalty", "min_tokens")
BASE: dict[str, dict[str, Any]] = {
    "completions": {"model": MODEL, "prompt": "Once", "max_tokens": 1},
    "chat": {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
}
#: What a field is good for only together with.
BESIDE: dict[str, dict[str, Any]] = {"stream_options": {"stream": True}, "top_logprobs": {"logprobs": True}}


def table(heading: str) -> list[list[str]]:
    """The rows of the first table under a heading, without its first two lines."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def words(cell: str) -> list[str]:
    """What a cell has in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def by_endpoint(heading: str) -> dict[str, list[list[str]]]:
    rows = table(heading)
    assert {row[1] for row in rows} <= {"both", *PATHS}
    return {endpoint: [row for row in rows if row[1] in ("both", endpoint)] for endpoint in PATHS}


TAKEN, PASSED_OVER, NOT_TAKEN = (by_endpoint(f"Fields that are {how}") for how in ("taken", "ignored", "refused"))


def name_of(row: list[str]) -> str:
    [name] = words(row[0])
    return name


@pytest.mark.parametrize("endpoint", PATHS)
def test_the_tables_have_the_fields_of_the_code(endpoint: str) -> None:
    taken, ignored, refused = ([name_of(row) for row in rows[endpoint]] for rows in (TAKEN, PASSED_OVER, NOT_TAKEN))
    for names in (taken, ignored, refused):
        assert len(set(names)) == len(names)
    assert set(ignored) == IGNORED[endpoint]
    assert set(refused) == set(REFUSED[endpoint])
    assert set(taken) == KNOWN[endpoint] - set(ignored) - set(refused)
    passing = {name_of(row): [json.loads(word) for word in words(row[2])] for row in NOT_TAKEN[endpoint]}
    assert passing == {name: list(accepted) for name, (accepted, _) in REFUSED[endpoint].items()}


def test_numeric_defaults_are_those_of_the_code() -> None:
    defaults: dict[str, Any] = {
        name: getattr(SamplingParams(), name) for name in ("top_k", "min_p", "repetition_penalty", *COUNTED)
    }
    defaults |= requests.API_DEFAULTS | {
        "max_tokens": requests.COMPLETION_TOKENS,
        "top_logprobs": 0,
        "n": 1,
        "priority": 0,
    }
    rows = [row for endpoint in PATHS for row in TAKEN[endpoint] if re.fullmatch(r"[\d.]+", row[4])]
    assert {name_of(row): float(row[4]) for row in rows} == defaults


def test_limits_endpoints_metrics_and_the_logs_fields_are_those_of_the_code() -> None:
    limits = {row[0]: row[1] for row in table("Limits")}
    assert limits["strings in `stop`"] == str(sampling_params.MOST_STOP_STRINGS)
    assert limits["alternatives of `logprobs`"] == str(sampling_fields.MOST_LOGPROBS)
    assert limits["time for the body to arrive"] == f"{body.BODY_TIMEOUT_S} s"
    assert limits["characters of one of them"] == str(sampling_params.LONGEST_STOP)
    assert limits["time for the request line and headers to arrive"] == f"{connections.HEADERS_TIMEOUT_S:g} s"
    assert limits["client that does not read its answer"] == f"{connections.UNREAD_TIMEOUT_S:g} s"
    assert limits["idle connection"] == f"{connections.IDLE_TIMEOUT_S} s"
    template = f"{template_renderer.TIME_LIMIT_S:g} s, {template_renderer.MEMORY_LIMIT / 2**30:g} GiB"
    assert limits["chat template"] == template
    options = {option.name: option.default for option in serve_command.params}
    assert limits["body"] == "`--max-body`, 1 MiB"
    assert options["max_body"] == 2**20
    assert limits["connections"] == f"`--max-connections`, {options['max_connections']}"
    help_text = " ".join(CliRunner().invoke(serve_command, ["--help"]).output.split())
    assert (
        f"Further limits: {connections.HEADERS_TIMEOUT_S:g} s for a request's headers, {body.BODY_TIMEOUT_S} s for "
        f"its body, {connections.IDLE_TIMEOUT_S} s for an idle connection, {connections.UNREAD_TIMEOUT_S:g} s for a "
        f"client that reads nothing, {template.replace(', ', ' and ')} for the chat template, "
        f"{sampling_params.MOST_STOP_STRINGS} stop strings of {sampling_params.LONGEST_STOP:,} characters, "
        f"{sampling_fields.MOST_LOGPROBS} alternatives of logprobs"
    ) in help_text
    assert f"within `--grace` seconds ({options['grace']})" in PAGE
    assert f"{errors.RETRY_AFTER_S} (second), with 429 and 503" in PAGE
    for option in set(re.findall(r"--[a-z][a-z-]+", PAGE)):
        assert option in CliRunner().invoke(serve_command, ["--help"]).output, option

    found = [
        route for kind in (_Endpoints, TokenEndpoints, ScoringEndpoints) for route in kind.routes(object.__new__(kind))
    ]
    routes = {route.path.replace(":path", ""): route.methods for route in found}
    assert [words(row[0])[0] for row in table("Endpoints")] == list(routes)
    for path, method in ((words(row[0])[0], row[1]) for row in table("Endpoints")):
        assert method in (routes[path] or ())

    metrics = [(metric.name + "_total" * (metric.kind == "counter"), metric.kind) for metric in STATE_METRICS]
    metrics += [(metric.name, metric.kind) for metric in REQUEST_METRICS]
    assert [(words(row[0])[0], row[1]) for row in table("Metrics")] == metrics

    assert tuple(name for row in table("Log") for name in words(row[0])) == request_log.FIELDS
    assert f"up to {logs.MOST_CHARACTERS} characters" in PAGE
    assert all(f"`{level}`" in PAGE for level in logs.LEVELS)
    for line in PAGE.split("```text\n")[1].split("```")[0].splitlines():
        assert re.match(r"\S+Z INFO starling\.serve\.request: POST /v1/completions \d{3} request_id=", line)
        assert set(re.findall(r"(\w+)=", line)) <= set(request_log.FIELDS)


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[Server]:
    limits = ("--max-batch", "1", "--max-queue", "1", "--max-seq", "2048", "--max-prompt", "64", "--max-body", "300000")
    with serving(tiny_bundle, *limits, env={"STARLING_API_KEY": "key"}) as running:
        yield running


def ask(
    server: Server, endpoint: str, change: dict[str, Any], **headers: str
) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, error and headers of a request by the real client that changes the base of its endpoint.

    What the client has no argument for goes into `extra_body`, as its users would send it.
    """
    name = next(iter(change), "")
    asked = BASE[endpoint] | BESIDE.get(name, {}) | change
    client = server.client("key")
    create = {"completions": client.completions, "chat": client.chat.completions}[endpoint].with_raw_response.create
    arguments = signature(create).parameters
    beside = {"extra_body": {key: value for key, value in asked.items() if key not in arguments}}
    try:
        reply = create(
            **{key: value for key, value in asked.items() if key in arguments}, **beside, extra_headers=headers
        )
    except openai.APIStatusError as error:
        body: Any = error.body
        return error.status_code, body, dict(error.response.headers)
    reply.http_response.read()
    return reply.status_code, {}, dict(reply.headers)


#: Good and bad values of the types that are not just a range of numbers.
TYPES: dict[str, tuple[list[Any], list[Any]]] = {
    "string, list of token ids, or list of such prompts": (
        ["Hi", [5, 6], ["Hi"], [[5]], ["a", "b"], ["a", [5]], [[5], [6]]],
        ["", [], [5, "x"], ["x", 5], [[5], []], 5, {}, ["a", "b", "c"]],
    ),
    "list of messages": (
        [
            [{"role": role, "content": "Hi"}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
            for role in ("system", "developer")
        ]
        + [[{"role": "user", "content": "Hi", "name": "Bo", "tool_calls": []}]],
        [
            [],
            "Hi",
            [5],
            [{"role": "tool", "content": "x"}],
            [{"role": "assistant"}],
            [{"role": "user", "content": "x", "tool_calls": [1]}],
        ],
    ),
    "string, or list of strings": (["x", ["a", "b", "c", "d"]], ["", [""], ["a"] * 65, 5]),
    "list of token ids": ([[], [5]], ["x", [-1], ["x"]]),
    "object": ([], [[], "x"]),
    "object of numbers": ([{}, {"5": 1, "31999": -100}], [[], {"x": 1}, {"5": "1"}, {"5": 101}]),
    "string": ([], [5, ["x"]]),
    "list of strings": ([[], ["a", "b c"]], ["a", [1], [""]]),
    "list of tools": ([[]], ["x", [5], [{"type": "function"}], [{"type": "function", "function": {"name": "f"}}]]),
    "choice of a tool": (["none", "auto"], [5, "any", "required", {"type": "function", "function": {"name": "f"}}]),
    "list of texts": ([["a", "b c"]], ["a", [], [""], [1]]),
    "JSON schema": ([{"type": "integer"}, '{"type": "integer"}', True], [5, [], "{", False, {"not": {}}]),
    "true or false": ([True, False], ["yes", 1]),
    "whole number": ([], ["1", 1.5, True]),
    "number": ([], ["1", True]),
}
#: Good and bad values of each range.
RANGES: dict[str, tuple[list[float], list[float]]] = {
    "": ([], []),
    "-1 or more": ([-1, 0, 10**9], [-2]),
    "0 or more": ([0, 1, 10**30], [-1]),
    "-2 to 2": ([-2, 0.5, 2], [-2.1, 3]),
    "0 to `max_tokens`": ([0, 1], [-1, 2]),
    "above 0": ([60], [0, -1]),
    "above 0 to 1": ([0.01, 1], [0, 1.01]),
    "1e-6 to 1e6": ([1e-6, 2, 1e6], [0, 1e-7, 2e6]),
    "0 to 1": ([0, 1], [-0.1, 1.1]),
    "up to 256 characters": ([], []),
    "-2,147,483,647 to 2,147,483,647": ([-(2**31) + 1, 0, 2**31 - 1], [-(2**31), 2**31]),
    "0 to 20": ([0, 20], [-1, 21]),
    # Two: as many as this server runs and lets wait.
    "1 to 128": ([1, 2], [0, 3, 129]),
    "`n` to 128": ([1, 2], [0, 3, 129]),
}
#: Ends an answer that would go on to the end of the cache.
ANY_TOKEN = {"stop_token_ids": list(range(32100))}
GOOD: dict[str, list[Any]] = {
    "model": [MODEL],
    "template": ["default"],
    "stream_options": [{"include_usage": True}],
    "chat_template_kwargs": [{}, {"enable_thinking": False, "list": [1, 2.5, None, {"a": "<s>"}]}],
    "reasoning_effort": ["low"],
    "cache_salt": ["", "tenant 7", "x" * sampling_fields.LONGEST_SALT],
    "response_format": [
        {"type": "text"},
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "x"}},
    ],
    "structured_outputs": [
        {"json": True},
        {"regex": "a"},
        {"choice": ["a"]},
        {"json_object": True},
        {"grammar": "start: /a/"},
    ],
    "guided_regex": ["[0-9]"],
    "guided_grammar": ["start: /a/", 'root ::= "a"'],
}
#: Bad values of some fields, beside those of their types.
BAD: dict[str, list[Any]] = {
    "response_format": [
        {},
        {"type": "xml"},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"schema": 5}},
    ],
    "structured_outputs": [{"xml": 1}, {"regex": 5}, {"json": {}, "regex": "a"}, {"whitespace_pattern": " "}],
    "guided_regex": ["(", ""],
    "guided_grammar": ["start: (", ""],
    "stream_options": [{"include_usage": "yes"}],
    "cache_salt": ["x" * (sampling_fields.LONGEST_SALT + 1)],
    "reward_model": ["nobody"],
    "chat_template_kwargs": [{"messages": []}, {"eos_token": "x"}, {"two words": 1}, {"a": "x" * 70000}],
}


@pytest.mark.parametrize("endpoint", PATHS)
def test_fields_are_taken_as_their_row_says(server: Server, endpoint: str) -> None:
    for row in TAKEN[endpoint]:
        name, kind, span = name_of(row), row[2], row[3]
        good, bad = ([*a, *b] for a, b in zip(TYPES[kind], RANGES[span], strict=True))
        for value in [*good, *GOOD.get(name, [])]:
            quick = ANY_TOKEN if value == 10**30 else {}
            status, error, _ = ask(server, endpoint, {name: value} | quick)
            assert status == 200, (name, value, error)
        for value in [*bad, *BAD.get(name, [])]:
            status, error, _ = ask(server, endpoint, {name: value})
            assert status == 400, (name, value)
            assert re.split(r"[.\[]", error["param"])[0] == name, (name, value, error)
        status, error, _ = ask(server, endpoint, {name: None} | (ANY_TOKEN if name == "max_tokens" else {}))
        left_out = (400, "missing_required_parameter") if row[4] == "required" else (200, None)
        assert (status, error.get("code")) == left_out, name


@pytest.mark.parametrize("endpoint", PATHS)
def test_fields_are_ignored_and_refused_as_their_row_says(server: Server, endpoint: str) -> None:
    everything = {name_of(row): {"any": ["value"]} for row in PASSED_OVER[endpoint]}
    assert ask(server, endpoint, everything)[0] == 200
    for row in NOT_TAKEN[endpoint]:
        name = name_of(row)
        for value in [None, *map(json.loads, words(row[2]))]:
            assert ask(server, endpoint, {name: value})[0] == 200, (name, value)
        status, error, _ = ask(server, endpoint, {name: {"other": "value"}})
        assert (status, error["param"], error["code"]) == (400, name, "unsupported_parameter")
    other = {*KNOWN["chat"], *KNOWN["completions"]} - KNOWN[endpoint]
    like = {"max_token", "max_new_tokens", "repeat_penalty", "temprature", "top_a", "stops"}
    for name in other | like:
        status, error, _ = ask(server, endpoint, {name: 1})
        assert (status, error["param"], error["code"]) == (400, name, "unknown_parameter")
    for name in ("request_id", "priority_class", "no_such"):
        status, _, headers = ask(server, endpoint, {name: 1})
        assert (status, headers["x-starling-ignored"]) == (200, name)


def test_every_field_of_openais_client_is_taken_ignored_or_refused_by_name() -> None:
    own = {"completions": completion_fields, "chat": chat_fields}
    for endpoint, module in own.items():
        kinds = (module.CompletionCreateParamsStreaming, module.CompletionCreateParamsNonStreaming)
        names = {name for kind in kinds for name in get_type_hints(kind)}
        assert len(names) > 15
        assert names <= KNOWN[endpoint], names - KNOWN[endpoint]


def test_errors_are_those_of_the_table(server: Server) -> None:
    long = {"max_tokens": 2000, "ignore_eos": True}
    seen: dict[tuple[int, str, str | None], dict[str, str]] = {}

    def note(status: int, error: dict[str, Any], headers: dict[str, str]) -> None:
        assert set(error) == {"message", "type", "param", "code"}
        seen[status, error["type"], error["code"]] = headers

    for change in (
        *({"temperature": -1}, {"prompt": None}, {"max_token": 1}, {"suffix": "x"}, {"top_p": "x"}, {"logprobs": 21}),
        *({"stop": ["a"] * 65}, {"prompt": "word " * 100}, {"model": "x"}, {"prompt": "x" * 300_000}),
        long | {"deadline_s": 0.2},
    ):
        note(*ask(server, "completions", change))
    note(*ask(server, "completions", {}, Authorization="Bearer wrong"))
    note(*ask(server, "completions", {}, Host="evil.example"))
    note(*ask(server, "completions", {}, **{"Content-Type": "text/plain"}))
    for method, path in (("GET", "/nothing"), ("GET", "/v1/completions")):
        status, headers, content = server.request(method, path, headers={"Authorization": "Bearer key"})
        note(status, json.loads(content)["error"], dict(headers))
    streams = [server.client("key").completions.create(**BASE["completions"] | {"max_tokens": 2000}, stream=True)]
    next(iter(streams[0]))
    with socket.create_connection(("127.0.0.1", server.port)) as waiting:
        content = json.dumps(BASE["completions"]).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: [::1]\r\nContent-Type: application/json\r\n"
        waiting.sendall(f"{head}Authorization: Bearer key\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
        while server.metric("vllm:num_requests_waiting") == 0:
            pass
        note(*ask(server, "completions", {}))
    streams[0].close()

    rows = {(int(row[0]), words(row[1])[0], words(row[2])[0]): row for row in table("Errors")}
    told = {(status, kind, code or "null") for status, kind, code in seen}
    # A body that is slow for 30 s; a failure, and an end, which test_serve_log.py and test_serve_refusals.py have.
    elsewhere = {
        (408, "invalid_request_error", "null"),
        (500, "server_error", "null"),
        (503, "service_unavailable_error", "shutting_down"),
    }
    assert told == set(rows) - elsewhere
    unanswered = [errors.internal(""), errors.shutting_down(), errors.ApiError(408, "")]
    assert {(error.status, error.kind, error.code or "null") for error in unanswered} == elsewhere
    assert seen[429, "rate_limit_error", "queue_full"]["retry-after"] == str(errors.RETRY_AFTER_S)
    assert seen[401, "invalid_request_error", "invalid_api_key"]["www-authenticate"] == "Bearer"
    assert seen[405, "invalid_request_error", None]["allow"] == "POST"


def test_a_bundles_own_sampling_defaults_are_the_servers(tiny_bundle: Path, tmp_path: Path) -> None:
    from command_line import copy_bundle, edit_manifest

    own = copy_bundle(tiny_bundle, tmp_path / "own")
    edit_manifest(own, generation={"do_sample": True, "temperature": 0, "top_p": None, "top_k": 3})
    with serving(own, "--max-seq", "64") as server:
        texts = {
            server.client().completions.create(model=MODEL, prompt="Once", max_tokens=8).choices[0].text for _ in "abc"
        }
        assert len(texts) == 1
        assert not any("sampled at" in line for line in server.log)
