"""The tools of a chat request: OpenAI's `tools`, `tool_choice` and `parallel_tool_calls`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from starling.engine.errors import PromptError, SamplingError, shown
from starling.engine.generation.sampling_params import SamplingParams
from starling.engine.text.grammar import GrammarSpec
from starling.engine.text.tool_formats import ToolFormat, format_of, knows_tools, marks_shown
from starling.engine.text.tool_grammar import Function, call_grammar
from starling.serving.api.api_errors import bad_field
from starling.serving.api.fields import Fields

TOOL_FIELDS = frozenset({"tools", "tool_choice", "parallel_tool_calls"})
#: OpenAI's own limits: of the list, and of a function's name.
MOST_TOOLS = 128
_NAME = re.compile("[a-zA-Z0-9_-]{1,64}")
_CHOICES = ("none", "auto", "required")
#: Lists and objects within each other.
_DEEPEST = 32


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools that an answer may call."""

    #: As the request has them: what the chat template is given.
    tools: tuple[dict[str, Any], ...]
    functions: tuple[Function, ...]
    #: Whether the answer must be a call.
    must_call: bool
    #: Whether a function has `strict`: calls are then decoded under its schema.
    strict: bool
    parallel: bool

    @property
    def names(self) -> frozenset[str]:
        """The functions that may be called."""
        return frozenset(function.name for function in self.functions)


def read_tools(fields: Fields) -> ToolUse | None:
    """The tools of a request, None where it has none or must not call them. Raises ApiError that names the field."""
    tools = fields.get("tools", list, [])
    parallel = fields.get("parallel_tool_calls", bool, True)
    if len(tools) > MOST_TOOLS:
        raise bad_field("tools", f"tools has {len(tools)} of them: give at most {MOST_TOOLS}", "array_above_max_length")
    functions = tuple(_function(f"tools[{index}]", tool) for index, tool in enumerate(tools))
    names = [function.name for function in functions]
    for index, name in enumerate(names):
        if name in names[:index]:
            problem = f"tools[{index}].function.name is {shown(name)}, as another one's: names must differ"
            raise bad_field(f"tools[{index}].function.name", problem, "invalid_value")
    choice = _choice(fields, names)
    if not functions or choice == "none":
        return None
    named = choice not in _CHOICES
    strict = any(tool["function"].get("strict") is True for tool in tools)
    if named:
        functions = tuple(function for function in functions if function.name == choice)
    return ToolUse(tuple(tools), functions, named or choice == "required", strict, parallel and not named)


def settings_with_tools(
    params: SamplingParams, use: ToolUse, template: str, special: Mapping[str, int]
) -> tuple[SamplingParams, ToolFormat]:
    """The settings of an answer that may call tools, and the form in which the model of this chat template calls them.

    `special` are the special tokens by their texts. Raises PromptError where no form is known, ApiError for what cannot
    be held to.
    """
    known = _form_of(template, params.grammar)
    return _with_tools(params, use, known, special), known


def _with_tools(params: SamplingParams, use: ToolUse, known: ToolFormat, special: Mapping[str, int]) -> SamplingParams:
    params = replace(params, shown_tokens=marks_shown(known, special))
    if not (use.must_call or use.strict):
        return params
    if not known.is_json:
        problem = f"this model writes calls in a form ({known.name}) that is not JSON, so none can be forced"
        raise bad_field(
            "tool_choice" if use.must_call else "tools", f"{problem}: send tool_choice auto", "unsupported_parameter"
        )
    try:
        grammar = call_grammar(known, use.functions, special, must_call=use.must_call, parallel=use.parallel)
    except SamplingError as error:
        raise bad_field("tools", error.client_message, "invalid_value") from None
    return replace(params, grammar=replace(grammar, field="tools"))


def _form_of(template: str, grammar: GrammarSpec | None) -> ToolFormat:
    if grammar is not None:
        problem = f"{grammar.field} says what the answer must look like, and tools are given too"
        raise PromptError(problem, detail="send one of them, or tool_choice none", field="tools")
    known = format_of(template)
    if known is None:
        problem = (
            "this model writes calls of tools in a form that is not known"
            if knows_tools(template)
            else "this model's chat template knows no tools"
        )
        raise PromptError(problem, detail="describe them in a message", field="tools")
    return known


def _function(where: str, tool: Any) -> Function:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        kind = tool.get("type") if isinstance(tool, dict) else None
        raise bad_field(f"{where}.type", f"{where}.type is {shown(kind)}: only function is known", "invalid_value")
    function = tool.get("function")
    if not isinstance(function, dict):
        raise bad_field(f"{where}.function", f"{where}.function is missing or no object", "missing_required_parameter")
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        place = f"{where}.function.name"
        raise bad_field(place, f"{place} is {shown(name)}: give 1 to 64 letters, digits, _ and -", "invalid_value")
    if parameters is not None and not isinstance(parameters, dict):
        place = f"{where}.function.parameters"
        raise bad_field(place, f"{place} is no object: give a JSON schema", "invalid_type")
    if _is_deep(tool):
        raise bad_field(where, f"{where} is nested more than {_DEEPEST} deep: give less", "invalid_value")
    return Function(name, parameters or {"type": "object", "properties": {}, "additionalProperties": False})


def _is_deep(value: Any) -> bool:
    """Without recursion: what is nested deeply is refused before anything walks through it."""
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
    return bool(level)


def _choice(fields: Fields, names: list[str]) -> str:
    """none, auto, required, or the name of a function."""
    value = fields.values.get("tool_choice", "auto")
    if isinstance(value, str):
        if value not in _CHOICES:
            problem = f"tool_choice is {shown(value)}: give one of {', '.join(_CHOICES)}, or a function"
            raise bad_field("tool_choice", problem, "invalid_value")
        if value == "required" and not names:
            raise bad_field(
                "tool_choice", "tool_choice is required, but there are no tools: send some", "invalid_value"
            )
        return value
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        problem = "tool_choice names no function: give {type: function, function: {name: …}}"
        raise bad_field("tool_choice", problem, "invalid_type")
    if name not in names:
        problem = f"tool_choice is the function {shown(name)}, which is not in tools: name one of those"
        raise bad_field("tool_choice", problem, "invalid_value")
    return name
