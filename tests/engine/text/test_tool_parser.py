"""Calls of tools are found in answers of every known form, wherever the text is cut."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest

from starling.engine.text.tool_formats import (
    FUNCTION_GEMMA,
    GEMMA4,
    HERMES,
    LLAMA3,
    MISTRAL_LIST,
    MISTRAL_NAMED,
    ToolFormat,
    format_of,
)
from starling.engine.text.tool_parser import CallPiece, Piece, ToolParser

NAMES = ("get_weather", "add", "now")


@dataclass(frozen=True)
class Answer:
    """What a model of one form wrote, and what is in it."""

    form: ToolFormat
    written: str
    text: str
    calls: tuple[tuple[str, Any], ...]


WEATHER = ("get_weather", {"city": "Zürich", "days": 2})
ANSWERS = {
    "hermes": Answer(
        HERMES,
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich", "days": 2}}\n</tool_call>',
        "",
        (WEATHER,),
    ),
    "hermes, with a text before, and two calls": Answer(
        HERMES,
        'Let me look.\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich", "days": 2}}\n'
        "</tool_call>\n"
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        "Let me look.",
        (WEATHER, ("now", {})),
    ),
    "hermes, the arguments first": Answer(
        HERMES,
        '<tool_call>{"arguments": {"a": 1, "b": [2]}, "name": "add"}</tool_call>',
        "",
        (("add", {"a": 1, "b": [2]}),),
    ),
    "hermes, with braces, quotes and marks in a string": Answer(
        HERMES,
        '<tool_call>\n{"name": "add", "arguments": {"a": "}\\"{</tool_call", "b": "\\\\"}}\n</tool_call>',
        "",
        (("add", {"a": '}"{</tool_call', "b": "\\"}),),
    ),
    "hermes, the arguments as a string": Answer(
        HERMES, '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', "", (("add", {"a": 1}),)
    ),
    "hermes, without its end": Answer(
        HERMES, '<tool_call>{"name": "add", "arguments": {"a": 1}}', "", (("add", {"a": 1}),)
    ),
    "hermes, a mark begun": Answer(HERMES, "a < b, <tool> and <tool_ca", "a < b, <tool> and <tool_ca", ()),
    "hermes, no JSON": Answer(HERMES, "<tool_call>ask them</tool_call>", "<tool_call>ask them</tool_call>", ()),
    "hermes, no call": Answer(HERMES, "Just text.\n", "Just text.\n", ()),
    "mistral": Answer(
        MISTRAL_LIST,
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Zürich", "days": 2}}, '
        '{"name": "now", "arguments": {}, "id": "abcdefghi"}]',
        "",
        (WEATHER, ("now", {})),
    ),
    "mistral, no call": Answer(MISTRAL_LIST, "It is [sunny].", "It is [sunny].", ()),
    "mistral, newer": Answer(
        MISTRAL_NAMED,
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Zürich", "days": 2}[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{}',
        "",
        (WEATHER, ("now", {})),
    ),
    "mistral, newer, without a second mark": Answer(
        MISTRAL_NAMED, 'Well. [TOOL_CALLS]add{"a": 1}', "Well.", (("add", {"a": 1}),)
    ),
    "llama": Answer(LLAMA3, '{"name": "get_weather", "parameters": {"city": "Zürich", "days": 2}}', "", (WEATHER,)),
    "llama, with its mark": Answer(
        LLAMA3, '<|python_tag|>{"name": "add", "parameters": {"a": 1}}', "", (("add", {"a": 1}),)
    ),
    "llama, two calls": Answer(
        LLAMA3,
        '{"name": "now", "parameters": {}}; {"name": "add", "parameters": {"a": 1}}',
        "",
        (("now", {}), ("add", {"a": 1})),
    ),
    "llama, a type first": Answer(
        LLAMA3, '{"type": "function", "name": "add", "parameters": {"a": 1}}', "", (("add", {"a": 1}),)
    ),
    "llama, JSON that is no call": Answer(
        LLAMA3, '{"name": "Ann", "parameters": {}} or so', '{"name": "Ann", "parameters": {}} or so', ()
    ),
    "llama, text": Answer(LLAMA3, "Hello {you}", "Hello {you}", ()),
    "functiongemma": Answer(
        FUNCTION_GEMMA,
        "<start_function_call>call:get_weather{city:<escape>Zürich<escape>,days:2}<end_function_call>",
        "",
        (WEATHER,),
    ),
    "functiongemma, nested": Answer(
        FUNCTION_GEMMA,
        "<start_function_call>call:add{a:[1,2.5,<escape>x,}<escape>],b:{c:true,d:null}}<end_function_call>"
        "<start_function_call>call:now{}<end_function_call>",
        "",
        (("add", {"a": [1, 2.5, "x,}"], "b": {"c": True, "d": None}}), ("now", {})),
    ),
    "functiongemma, broken": Answer(
        FUNCTION_GEMMA,
        "<start_function_call>call:add{a:<escape>x}<end_function_call>",
        "<start_function_call>call:add{a:<escape>x}<end_function_call>",
        (),
    ),
    "gemma 4": Answer(
        GEMMA4,
        'I look.<|tool_call>call:get_weather{city:<|"|>Zürich<|"|>,days:2}<tool_call|>',
        "I look.",
        (WEATHER,),
    ),
}


def joined(pieces: Iterable[Piece]) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """The text and the calls of all pieces, their arguments read."""
    text, names, arguments = "", dict[int, str](), dict[int, str]()
    for piece in pieces:
        if isinstance(piece, CallPiece):
            assert (piece.name is not None) == (piece.index not in names)
            names.setdefault(piece.index, piece.name or "")
            arguments[piece.index] = arguments.get(piece.index, "") + piece.arguments
        else:
            text += piece
    return text, tuple((names[index], json.loads(arguments[index])) for index in sorted(names))


def parsed(form: ToolFormat, texts: Iterable[str], **settings: bool) -> list[Piece]:
    parser = ToolParser(form, NAMES, **settings)
    return [piece for text in texts for piece in parser.push(text)] + parser.flush()


@pytest.mark.parametrize("name", ANSWERS)
def test_calls_are_found_wherever_the_text_is_cut(name: str) -> None:
    answer = ANSWERS[name]
    written, expected = answer.written, (answer.text, answer.calls)
    assert joined(parsed(answer.form, [written])) == expected
    assert joined(parsed(answer.form, written)) == expected, "a character at a time"
    for cut in range(1, len(written)):
        assert joined(parsed(answer.form, [written[:cut], written[cut:]])) == expected, (written[:cut], written[cut:])


def test_text_and_arguments_come_as_soon_as_they_are_certain() -> None:
    parser = ToolParser(HERMES, NAMES)
    assert parser.push("Wait, <") == ["Wait,"]
    assert parser.push(" 3") == [" < 3"]
    assert parser.push('<tool_call>{"name": "add", "arguments": {"a"') == [
        CallPiece(0, "add", ""),
        CallPiece(0, None, '{"a"'),
    ]
    assert parser.push(": 1") == [CallPiece(0, None, ": 1")]
    assert parser.push("}}") == [CallPiece(0, None, "}")]
    assert parser.push("</tool_call>") == parser.flush() == []


def test_only_the_first_call_without_parallel_ones() -> None:
    answer = ANSWERS["hermes, with a text before, and two calls"]
    pieces = parsed(answer.form, answer.written, parallel=False)
    assert joined(pieces) == (answer.text, answer.calls[:1])


@pytest.mark.parametrize(
    "form", [HERMES, MISTRAL_LIST, MISTRAL_NAMED, LLAMA3, FUNCTION_GEMMA, GEMMA4], ids=lambda form: form.name
)
def test_what_is_cut_or_broken_ends_as_text_or_as_a_part_of_a_call(form: ToolFormat) -> None:
    whole = next(answer.written for answer in ANSWERS.values() if answer.form == form)
    for cut in range(len(whole)):
        pieces = parsed(form, whole[:cut])
        calls = [piece for piece in pieces if isinstance(piece, CallPiece)]
        assert {piece.index for piece in calls} == set(range(len({piece.index for piece in calls})))
        assert all(piece.arguments in whole for piece in calls) or form.style == "braces"
    for broken in (
        whole[::-1],
        form.begin * 50,
        form.begin + "{" * 5000,
        form.begin + "[" * 5000 + form.end,
        form.begin + '{"name": 5}',
    ):
        parsed(form, broken)


#: What each kind of template says about calls, in its own words.
TEMPLATES = {
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>"
    ' <tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>{% endif %}': HERMES,
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools }}[/AVAILABLE_TOOLS]{% endif %}{{ '[TOOL_CALLS] [' }}": MISTRAL_LIST,
    "{% if tools %}{{ tools }}{% endif %}{{ '[TOOL_CALLS]' + call.name + '[ARGS]' + arguments }}": MISTRAL_NAMED,
    '{% if tools %}Environment: ipython\nRespond in the format {"name": function name, "parameters": dictionary of '
    "argument name and its value}.{% endif %}": LLAMA3,
    "{% for tool in tools %}{{ tool }}{% endfor %}<start_function_call>call:{{ name }}{<escape>": FUNCTION_GEMMA,
    '{% for tool in tools %}<|tool>{{ tool }}{% endfor %}<|tool_call>call:{{ n }}{k:<|"|>v<|"|>}<tool_call|>': GEMMA4,
    "{% if tools %}<tool_call><function=example>{% endif %}</tool_call>": None,
    "{% if tools %}{{ tools }}{% endif %}": None,
    "{{ messages[0].content }} <tool_call></tool_call>": None,
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_says_which_form_its_model_writes(template: str) -> None:
    assert format_of(template) is TEMPLATES[template]
