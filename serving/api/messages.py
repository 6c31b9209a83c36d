"""Chat messages in the forms that OpenAI's API knows, as the bundle's chat template takes them, and its variables."""

from __future__ import annotations

from typing import Any

from starling.engine.errors import shown
from starling.serving.api.api_errors import bad_field
from starling.serving.api.fields import Fields

#: Roles, and what templates call them: `developer` is the newer name of the system message.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_KEYS = {"role", "content", "name"}
#: Fields of a chat that go to its template as they are.
TEMPLATE_FIELDS = frozenset({"chat_template_kwargs", "reasoning_effort"})


def read_messages(fields: Fields) -> list[dict[str, Any]]:
    """`messages` with their text as one string each. Raises ApiError that names the place, as messages[2].content."""
    messages = fields.required("messages", list)
    if not messages:
        raise bad_field("messages", "messages is empty: give at least one message")
    return [_message(f"messages[{index}]", value) for index, value in enumerate(messages)]


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
        if name not in _KEYS and item not in (None, [], {}):
            place = f"{where}.{name[:60]}"  # a name may be as long as the body
            raise bad_field(place, f"{place} is not supported: send text only")
    message = {"role": _ROLES[role], "content": _content(f"{where}.content", content)}
    if isinstance(value.get("name"), str):
        message["name"] = value["name"]
    return message


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
