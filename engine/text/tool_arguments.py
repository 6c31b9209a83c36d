"""The arguments of a call as models write them: where a JSON value ends, and Gemma's notation read."""

from __future__ import annotations

import re
from typing import Any

_SCALAR_END = re.compile(r"[\s,\]};]")
#: Objects and lists within each other: more is no call.
_MOST_DEPTH = 64


class JsonValue:
    """Finds the end of a JSON value whose text comes piece by piece; `depth` objects and lists are open already."""

    def __init__(self, depth: int = 0) -> None:
        self._depth, self._started = depth, depth > 0
        self._in_string = self._escaped = self._scalar = False

    def end(self, text: str) -> int | None:
        """Index in this piece after the value's last character; None where it goes on."""
        for index, char in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
                    if self._depth == 0:
                        return index + 1
            elif self._scalar:
                if _SCALAR_END.match(char):
                    return index
            elif char == '"':
                self._started = self._in_string = True
            elif char in "{[":
                self._started = True
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return index + 1
            elif not self._started and not char.isspace():
                self._started = self._scalar = True
        return None


def read_braces(text: str, quote: str) -> dict[str, Any]:
    """Gemma's arguments, `{key:value,…}` with `quote` around strings, as an object. Raises ValueError."""
    value, rest = _value(text.strip(), quote, 0)
    if not isinstance(value, dict) or rest.strip():
        raise ValueError("not one object")
    return value


def _value(text: str, quote: str, depth: int) -> tuple[Any, str]:
    """A value at the beginning of the text, and what follows it."""
    text = text.lstrip()
    if depth > _MOST_DEPTH:
        raise ValueError("nested too deeply")
    if text.startswith(quote):
        inner, found, rest = text[len(quote) :].partition(quote)
        if not found:
            raise ValueError("a string without its end")
        return inner, rest
    if text.startswith("{"):
        return _members(text[1:], quote, depth + 1)
    if text.startswith("["):
        return _items(text[1:], quote, depth + 1)
    end = _SCALAR_END.search(text)
    word, rest = (text[: end.start()], text[end.start() :]) if end else (text, "")
    return _scalar(word), rest


def _members(text: str, quote: str, depth: int) -> tuple[dict[str, Any], str]:
    found: dict[str, Any] = {}
    text = text.lstrip()
    while not text.startswith("}"):
        if text.startswith(quote):
            key, text = _value(text, quote, depth)
            colon, text = text.lstrip()[:1], text.lstrip()[1:]
        else:
            key, colon, text = text.partition(":")
        if colon != ":" or not key.strip():
            raise ValueError("a member without a name")
        found[key.strip()], text = _value(text, quote, depth)
        text = _past_comma(text, "}")
    return found, text[1:]


def _items(text: str, quote: str, depth: int) -> tuple[list[Any], str]:
    found: list[Any] = []
    text = text.lstrip()
    while not text.startswith("]"):
        item, text = _value(text, quote, depth)
        found.append(item)
        text = _past_comma(text, "]")
    return found, text[1:]


def _past_comma(text: str, end: str) -> str:
    text = text.lstrip()
    if text.startswith(end):
        return text
    if not text.startswith(","):
        raise ValueError("a comma is missing")
    return text[1:].lstrip()


def _scalar(word: str) -> Any:
    constants = {"true": True, "false": False, "null": None, "None": None}
    if word in constants:
        return constants[word]
    if not word:
        raise ValueError("a value is missing")
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word
