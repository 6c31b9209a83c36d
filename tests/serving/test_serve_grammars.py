"""Structured output over HTTP: the real OpenAI client, its `parse` with pydantic models, and vLLM's fields."""

import json
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import jsonschema
import openai
import pytest
from http_server import MODEL, Server, serving
from pydantic import BaseModel, ConfigDict, Field

PROMPT = "Once upon a time"
MESSAGES: list[Any] = [{"role": "user", "content": "Invent a place."}]


class Kind(Enum):
    TOWN = "town"
    VILLAGE = "village"


class Closed(BaseModel):
    """Without further members, which random weights would write without end."""

    model_config = ConfigDict(extra="forbid")


class Road(Closed):
    """A road to another place."""

    km: int = Field(ge=1, le=99)
    paved: bool


class Place(Closed):
    """What a chat is asked for: nested, with an enumeration, a pattern, a union and references."""

    kind: Kind
    code: str = Field(pattern="^[A-Z]{2}[0-9]{2}$")
    roads: list[Road] = Field(min_length=1, max_length=2)
    mayor: Literal["Ann", "Bo"] | None


SCHEMA: dict[str, Any] = Place.model_json_schema()


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[Server]:
    options = ("--max-batch", "4", "--max-seq", "512", "--speculation", "prompt-lookup")
    with serving(tiny_bundle, *options) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client()


def text_of(client: openai.OpenAI, **extra: Any) -> str:
    reply = client.chat.completions.create(model=MODEL, messages=MESSAGES, seed=3, **extra)
    assert reply.choices[0].finish_reason == "stop"
    return reply.choices[0].message.content or ""


def test_parse_gives_a_model(client: openai.OpenAI) -> None:
    reply = client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Place, n=2)
    for choice in reply.choices:
        assert isinstance(choice.message.parsed, Place)
        assert choice.finish_reason == "stop"


def test_a_parsed_stream_gives_a_model(client: openai.OpenAI) -> None:
    pieces: list[str] = []
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES, response_format=Place) as stream:
        for event in stream:
            if event.type == "content.delta":
                pieces.append(event.delta)
        final = stream.get_final_completion()
    parsed = final.choices[0].message.parsed
    assert isinstance(parsed, Place)
    assert Place.model_validate_json("".join(pieces)) == parsed
    assert len(pieces) > 3


def test_a_json_object_and_a_schema_without_strict(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}
    jsonschema.validate(json.loads(text_of(client, response_format=form)), SCHEMA)
    reply = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, response_format={"type": "json_object"}, max_tokens=400, temperature=2, seed=1
    )
    text = reply.choices[0].message.content or ""
    assert text.startswith("{")
    if reply.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)
    else:
        assert reply.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("field", "value", "pattern"),
    [
        ("guided_regex", "[A-F]{3}", "[A-F]{3}"),
        ("guided_choice", ["red", "dark blue"], "red|dark blue"),
        ("guided_grammar", 'root ::= "<" [a-z] ">"', "<[a-z]>"),
        ("guided_json", SCHEMA, None),
        ("guided_json", json.dumps(SCHEMA), None),
        ("structured_outputs", {"json": SCHEMA, "disable_fallback": True}, None),
        ("structured_outputs", {"choice": ["red", "dark blue"]}, "red|dark blue"),
    ],
)
def test_vllms_fields_in_both_endpoints(client: openai.OpenAI, field: str, value: Any, pattern: str | None) -> None:
    chat = text_of(client, extra_body={field: value})
    completion = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=200, extra_body={field: value})
    assert completion.choices[0].finish_reason == "stop"
    for text in (chat, completion.choices[0].text):
        if pattern is None:
            Place.model_validate_json(text)
        else:
            assert re.fullmatch(pattern, text)


def test_requests_with_and_without_a_grammar_share_the_batch(client: openai.OpenAI) -> None:
    free = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=24, temperature=0)
    streams = [
        client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True, extra_body={"guided_json": SCHEMA})
        for _ in range(3)
    ]
    again = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=24, temperature=0)
    assert again.choices[0].text == free.choices[0].text
    for stream in streams:
        Place.model_validate_json("".join(chunk.choices[0].delta.content or "" for chunk in stream))


def test_the_length_cuts_a_document_and_parse_says_so(client: openai.OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Place, max_tokens=4)


def test_a_real_model_fills_in_a_form(demo_int8_bundle: Path) -> None:
    class Answer(Closed):
        country: Literal["Japan", "France", "Chile"]
        sure: bool

    with serving(demo_int8_bundle) as running:
        messages: list[Any] = [{"role": "user", "content": "Which country is Paris in?"}]
        reply = running.client().chat.completions.parse(
            model=MODEL, messages=messages, response_format=Answer, temperature=0
        )
    assert reply.choices[0].message.parsed is not None
    assert reply.choices[0].message.parsed.country == "France"
