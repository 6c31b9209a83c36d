"""Typed reads from a request's JSON object; a wrong field raises ApiError with its name."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Mapping
from typing import Any, TypeAlias, TypeVar

from starling.engine.errors import did_you_mean, one_line, shown
from starling.serving.api.api_errors import ApiError, bad_field

T = TypeVar("T")

_WORDS = {
    **{str: "a string", bool: "true or false", int: "a whole number", float: "a number", list: "a list"},
    dict: "an object",
}
#: Fields whose values are the client's texts: no message, which may end up in a log, quotes them.
_TEXTS = frozenset({"prompt", "messages", "suffix", "prediction", "tools", "functions", "response_format", "stop"})

#: How alike the name of an unknown field is to a known one's where it is taken for that, misspelt (difflib's ratio).
#: `max_token` has 0.95, `max_new_tokens` 0.83, `repeat_penalty` 0.88, `top_a` 0.8 and `request_id` at most 0.6.
LIKE_A_KNOWN = 0.75

_HALF_A_PAIR = re.compile("[\ud800-\udfff]")

#: Fields that are taken only with a value that changes nothing: those values, and what to do without the others.
Unsupported: TypeAlias = Mapping[str, tuple[tuple[object, ...], str]]


def json_object(body: bytes) -> dict[str, Any]:
    """The JSON object of a request's body. Raises ApiError where it is none."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else one_line(error)
        raise ApiError(400, f"the body is not JSON in UTF-8: {reason}") from None
    if not isinstance(document, dict):
        raise ApiError(400, f"the body is a JSON {type(document).__name__}: send an object")
    return document


class Fields:
    """A request's fields. A field that is null counts as left out."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.values = {name: value for name, value in document.items() if value is not None}

    def get(self, name: str, kind: type[T], default: T) -> T:
        """A field of one type. A whole number also passes for a float, true and false never pass for a number."""
        value = self.values.get(name)
        return default if value is None else _checked(name, value, kind)

    def optional(self, name: str, kind: type[T]) -> T | None:
        """A field of one type, None where it is left out."""
        value = self.values.get(name)
        return None if value is None else _checked(name, value, kind)

    def required(self, name: str, kind: type[T]) -> T:
        """A field that must be there."""
        if name not in self.values:
            raise bad_field(name, f"{name} is missing: give {_WORDS[kind]}", "missing_required_parameter")
        return _checked(name, self.values[name], kind)

    def only(self, name: str, *accepted: object, why: str) -> None:
        """Refuse a field whose value is none of those that change nothing."""
        value = self.values.get(name)
        same = [value == other and isinstance(value, bool) is isinstance(other, bool) for other in accepted]
        if value is not None and not any(same):
            raise bad_field(name, f"{name} is {_shown(name, value)}: {why}", "unsupported_parameter")

    def refuse_unsupported(self, table: Unsupported) -> None:
        """Refuse the fields of a table where their values are none of those that change nothing."""
        for name, (accepted, why) in table.items():
            self.only(name, *accepted, why=why)

    def refuse_unknown(
        self, known: Collection[str], *, elsewhere: Collection[str] = (), least: float = 0.0
    ) -> tuple[str, ...]:
        """Refuse fields of other names: all, or those at least so alike to one known here or elsewhere. Returns others.

        A name with half a surrogate pair (a cut emoji) is no text and is always refused. Likeness is difflib's ratio: a
        slip (`max_token`) has more than LIKE_A_KNOWN.
        """
        others = tuple(name for name in self.values if name not in known)
        for name in others:
            short = name[:60]  # a name may be as long as the body
            if _HALF_A_PAIR.search(name) or least == 0 or did_you_mean(short, {*known, *elsewhere}, least=least):
                near = did_you_mean(short, known)
                raise bad_field(short, f"there is no parameter {short!r} here{near}: leave it out", "unknown_parameter")
        return others


def _checked(name: str, value: Any, kind: type[T]) -> T:
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise bad_field(name, f"{name} is {_shown(name, value)}: give {_WORDS[kind]}", "invalid_type")
    if kind is float and abs(value) > sys.float_info.max and isinstance(value, int):
        raise bad_field(name, f"{name} is {_shown(name, value)}: give a number that a float can hold", "invalid_value")
    checked: T = value
    return checked


def _shown(name: str, value: Any) -> str:
    """The value as JSON has it; those of text fields and lists only by their kind."""
    if name in _TEXTS or isinstance(value, list | dict):
        return _WORDS[type(value)]
    return json.dumps(value) if isinstance(value, bool) else shown(value)
