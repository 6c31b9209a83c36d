"""Chat messages in the forms that OpenAI's API knows, as the bundle's chat template takes them, and its variables."""

from __future__ import annotations

import json
from typing import Any

from starling.engine.errors import shown
from starling.serving.api.api_errors import bad_field
from starling.serving.api.fields import Fields

#: Roles, and what templates call them: `developer` is the newer name of the system message.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_KEYS = {"role", "content", "name"}
#: What messages of a role have besides.
_OWN_KEYS = {"assistant": {"tool_calls"}, "tool": {"tool_call_id"}}
#: Fields of a chat that go to its template as they are.
TEMPLATE_FIELDS = frozenset({"chat_template_kwargs", "reasoning_effort"})


def read_messages(fields: Fields) -> list[dict[str, Any]]:
    """`messages` with their text as one string each. Raises ApiError that names the place, as messages[2].content."""
    messages = fields.required("messages", list)
    if not messages:
        raise bad_field("messages", "messages is empty: give at least one message")
    read = [_message(f"messages[{index}]", value) for index, value in enumerate(messages)]
    names = {call["id"]: call["function"]["name"] for message in read for call in message.get("tool_calls", ())}
    for message in read:
        if message["role"] == "tool" and message["tool_call_id"] in names:
            message.setdefault("name", names[message["tool_call_id"]])
    return read


def read_template_variables(fields: Fields) -> dict[str, Any]:
    """Variables for the chat template; `reasoning_effort` is one of them. Raises ApiError for another type.

    What they may hold is for `ChatTemplates.encode` to check.
    """
    variables = dict(fields.get("chat_template_kwargs", dict, {}))
    effort = fields.optional("reasoning_effort", str)
    return variables if effort is None else variables | {"reasoning_effort": effort}


def _message(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise bad_field(where, f"{where} is no object: give role and content")
    role, content = value.get("role"), value.get("content")
    if not isinstance(role, str) or role not in _ROLES:
        raise bad_field(f"{where}.role", f"{where}.role is {shown(role)}: give one of {', '.join(_ROLES)}")
    for name, item in value.items():
        if name not in _KEYS | _OWN_KEYS.get(role, set()) and item not in (None, [], {}):
            place = f"{where}.{name[:60]}"  # a name may be as long as the body
            raise bad_field(place, f"{place} is not supported: send text only")
    calls = _calls(f"{where}.tool_calls", value.get("tool_calls")) if role == "assistant" else []
    message: dict[str, Any] = {"role": _ROLES[role]}
    message["content"] = "" if calls and content in (None, []) else _content(f"{where}.content", content)
    if calls:
        message["tool_calls"] = calls
    if role == "tool":
        message["tool_call_id"] = _text(f"{where}.tool_call_id", value.get("tool_call_id"))
    if isinstance(value.get("name"), str):
        message["name"] = value["name"]
    return message


def _calls(where: str, value: Any) -> list[dict[str, Any]]:
    """The calls of an earlier turn, their arguments read, as templates take them."""
    if value is not None and not isinstance(value, list):
        raise bad_field(where, f"{where} is no list of calls")
    return [_call(f"{where}[{index}]", call) for index, call in enumerate(value or [])]


def _call(where: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        raise bad_field(where, f"{where} is no call: give id, type and function")
    written = _text(f"{where}.function.arguments", function.get("arguments"), may_be_empty=True)
    try:
        arguments = json.loads(written) if written.strip() else {}
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        place = f"{where}.function.arguments"
        raise bad_field(place, f"{place} is no JSON object: send the arguments as they came")
    name = _text(f"{where}.function.name", function.get("name"))
    read = {"name": name, "arguments": arguments}
    return {"id": _text(f"{where}.id", call.get("id")), "type": "function", "function": read}


def _text(where: str, value: Any, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str) or not (value or may_be_empty):
        raise bad_field(where, f"{where} is {shown(value)}: give a string")
    return value


def _content(where: str, content: Any) -> str:
    """A text, or the texts of a list of parts joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise bad_field(where, f"{where} is no text: give a string, or parts of the type text")
    return "".join(_part(f"{where}[{index}]", part) for index, part in enumerate(content))


def _part(where: str, part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, dict) else None
        raise bad_field(where, f"{where} is of the type {shown(kind)}: only text is understood")
    text = part.get("text")
    if not isinstance(text, str):
        raise bad_field(f"{where}.text", f"{where}.text is no string")
    return text
