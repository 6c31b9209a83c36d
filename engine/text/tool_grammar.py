"""The grammar of an answer that calls tools: these functions, arguments of their schemas, the model's own form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starling.engine.text.grammar import JSON_LAYOUT, GrammarSpec
from starling.engine.text.tool_formats import ToolFormat


@dataclass(frozen=True, slots=True)
class Function:
    """A function that may be called."""

    name: str
    #: JSON schema of its arguments, an object.
    parameters: Mapping[str, Any]


def call_grammar(
    known: ToolFormat,
    functions: Sequence[Function],
    special: Mapping[str, int],
    *,
    must_call: bool,
    parallel: bool,
) -> GrammarSpec:
    """Calls of these functions, `special` being the tokenizer's special tokens by their texts.

    With `must_call` the answer is a call, or several where `parallel` and the form allow it; without, text may come
    before, or alone. Only forms whose arguments are JSON have one. Raises SamplingError where it is too long.
    """
    calls = [f"call_{index}" for index in range(len(functions))]
    rules = [_call(known, function, special, index) for index, function in enumerate(functions)]
    one = " | ".join(calls)
    lines = ["%llguidance {}", _start(known, special, must_call=must_call, parallel=parallel), f"call: {one}", *rules]
    return GrammarSpec.lark("\n".join(lines))


def _start(known: ToolFormat, special: Mapping[str, int], *, must_call: bool, parallel: bool) -> str:
    if known.style == "answer":
        return "start: call" if must_call else "start: call | TEXT\nTEXT: /[^{\\s](?s:.*)/"
    begin = _mark(known.begin, special)
    if known.style == "list":
        first, further = "call", ' (", " call)*' if parallel else ""
        calls = f'"[" {first}{further} "]"'
        begun = f"{begin} {calls}"
    else:
        begun = f"{begin} call"
        again = '"\\n" ' if known.style == "objects" else ""
        begun += f" ({again}{begin} call)*" if parallel else ""
    if must_call:
        return f"start: {begun}"
    # Lazy: the mark, wherever it comes first, begins a call; so text without one never has it.
    rest = begun[len(begin) :]
    if known.begin in special:
        return f"start: TEXT ({begun})?\nTEXT: /(?s:.*)/"
    return f"start: TEXT | lead{rest}\nlead[lazy]: TEXT {begin}\nTEXT: /(?s:.*)/"


def _call(known: ToolFormat, function: Function, special: Mapping[str, int], index: int) -> str:
    """The rule of a function's call, without the mark before it."""
    arguments = f"%json {json.dumps({'x-guidance': JSON_LAYOUT, **function.parameters}, ensure_ascii=False)}"
    if known.style == "named":
        before, after = f"{_quoted(function.name)} {_mark(known.mark, special)}", ""
    else:
        head = f'{{"name": {json.dumps(function.name)}, "{known.arguments}": '
        line = "\n" if known.style == "objects" else ""
        before = _quoted(line + head)
        after = _quoted("}" + line) + (f" {_mark(known.end, special)}" if known.end else "")
    return f"call_{index}: {before} args_{index} {after}\nargs_{index}: {arguments}"


def _mark(mark: str, special: Mapping[str, int]) -> str:
    """A mark in Lark's syntax: by its id where it is a special token, which no text matches."""
    return f"<[{special[mark]}]>" if mark in special else _quoted(mark)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
