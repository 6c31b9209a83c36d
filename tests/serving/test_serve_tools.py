"""Tools over HTTP with the real OpenAI client: calls whole and streamed, their results, and what is refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from http_server import MODEL, Server, serving
from tool_bundle import with_template

ADD: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/digit"}, "b": {"$ref": "#/$defs/digit"}},
    "required": ["a", "b"],
    "additionalProperties": False,
    "$defs": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}},
}
COLOR: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"enum": ["red", "dark blue"]}},
    "required": ["name"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "add", "description": "Adds two digits.", "parameters": ADD}},
    {"type": "function", "function": {"name": "paint", "parameters": COLOR, "strict": True}},
]
SCHEMAS = {"add": ADD, "paint": COLOR}
MESSAGES: list[Any] = [{"role": "user", "content": "What is 2 and 3 together?"}]
NAMED: Any = {"type": "function", "function": {"name": "paint"}}


@pytest.fixture(scope="module")
def server(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    bundle = with_template(tiny_bundle, tmp_path_factory.mktemp("tools") / "bundle")
    with serving(bundle, "--max-batch", "4", "--max-seq", "1024", "--speculation", "prompt-lookup") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client()


def check(call: Any) -> None:
    assert call.type == "function"
    assert call.id.startswith("call_")
    jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])


@pytest.mark.parametrize("seed", range(4))
def test_a_required_call_has_arguments_of_its_schema(client: openai.OpenAI, seed: int) -> None:
    settings: Any = {"model": MODEL, "messages": MESSAGES, "tools": TOOLS, "tool_choice": "required", "seed": seed}
    [choice] = client.chat.completions.create(**settings, max_tokens=300, parallel_tool_calls=False).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.tool_calls is not None
    [call] = choice.message.tool_calls
    check(call)
    with client.chat.completions.stream(**settings, max_tokens=300, parallel_tool_calls=False) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    [streamed] = final.choices[0].message.tool_calls or []
    assert (streamed.function.name, streamed.function.arguments) == (call.function.name, call.function.arguments)
    assert final.choices[0].finish_reason == "tool_calls"
    assert kinds.count("tool_calls.function.arguments.delta") > 1
    assert not final.choices[0].message.content


def test_a_named_function_is_the_one_that_is_called(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model=MODEL, messages=MESSAGES, tools=TOOLS, tool_choice=NAMED, n=2)
    for choice in reply.choices:
        [call] = choice.message.tool_calls or []
        check(call)
        assert call.function.name == "paint"


def test_several_calls_of_one_answer(client: openai.OpenAI) -> None:
    settings: Any = {"model": MODEL, "messages": MESSAGES, "tools": TOOLS, "tool_choice": "required"}
    most = 0
    for seed in range(12):
        reply = client.chat.completions.create(**settings, seed=seed, temperature=2, max_tokens=200)
        calls = reply.choices[0].message.tool_calls or []
        if reply.choices[0].finish_reason == "tool_calls":
            for call in calls:
                check(call)
        assert len({call.id for call in calls}) == len(calls)
        most = max(most, len(calls))
    assert most > 1


def test_the_loop_of_a_client(client: openai.OpenAI) -> None:
    messages = list(MESSAGES)
    first = client.chat.completions.create(
        model=MODEL, messages=messages, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, seed=1
    )
    message = first.choices[0].message
    messages.append(message)
    for call in message.tool_calls or []:
        messages.append({"role": "tool", "tool_call_id": call.id, "content": "5"})
    second = client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS, max_tokens=8)
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens > first.usage.prompt_tokens
    stream = client.chat.completions.create(
        model=MODEL, messages=[*messages, *MESSAGES], tools=TOOLS, tool_choice="none", max_tokens=8, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream)


def test_an_answer_without_a_call_is_text(client: openai.OpenAI) -> None:
    plain: Any = {"model": MODEL, "messages": MESSAGES, "max_tokens": 12, "temperature": 0, "tools": TOOLS[:1]}
    reply = client.chat.completions.create(**plain)
    assert reply.choices[0].message.tool_calls is None
    assert reply.choices[0].finish_reason == "length"
    pieces = list(client.chat.completions.create(**plain, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
    assert text == reply.choices[0].message.content
    assert pieces[-1].choices[0].finish_reason == "length"


CALL: dict[str, Any] = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tools": TOOLS[:1] * 2}, "tools[1].function.name"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "two words"}}]}, "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
            "tools[0].function.parameters",
        ),
        ({"tools": TOOLS * 65}, "tools"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "none"}}}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"response_format": {"type": "json_object"}}, "tools"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
                "tool_choice": "required",
            },
            "tools",
        ),
        ({"messages": [{"role": "tool", "content": "5"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "assistant", "tool_calls": [5]}]}, "messages[0].tool_calls[0]"),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "{"}}]}
                ]
            },
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
    ids=range(14),
)
def test_what_is_refused_is_named(server: Server, change: dict[str, Any], field: str) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "tools": TOOLS, "max_tokens": 2} | change
    status, _, content = server.request("POST", "/v1/chat/completions", body)
    error = json.loads(content)["error"]
    assert (status, error["param"]) == (400, field), error


def test_a_template_that_knows_no_tools_is_no_surprise(tiny_bundle: Path, tmp_path: Path) -> None:
    unknown = with_template(
        tiny_bundle, tmp_path / "b", "{% if tools %}{{ tools }}{% endif %}{{ messages[0].content }}"
    )
    for bundle, problem in ((tiny_bundle, "knows no tools"), (unknown, "in a form that is not known")):
        with serving(bundle) as running, pytest.raises(openai.BadRequestError, match=problem) as caught:
            running.client().chat.completions.create(model=MODEL, messages=MESSAGES, tools=TOOLS)
        assert caught.value.param == "tools"


def test_a_real_model_calls_and_reads_the_result(demo_int8_bundle: Path, tmp_path: Path) -> None:
    bundle = with_template(demo_int8_bundle, tmp_path / "bundle")
    with serving(bundle) as running:
        client, messages = running.client(), list(MESSAGES)
        first = client.chat.completions.create(
            model=MODEL,
            messages=messages,
            tools=TOOLS[:1],
            tool_choice="required",
            parallel_tool_calls=False,
            temperature=0,
        )
        [call] = first.choices[0].message.tool_calls or []
        assert json.loads(call.function.arguments) == {"a": 2, "b": 3}
        messages += [first.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "5"}]
        second = client.chat.completions.create(
            model=MODEL, messages=messages, tools=TOOLS[:1], tool_choice="none", temperature=0, max_tokens=40
        )
        # What a model of this size makes of the result differs by processor.
        assert second.choices[0].message.content
        assert second.choices[0].message.tool_calls is None
