"""Reads calls of tools out of an answer as its text comes, cut anywhere.

Text is handed on as soon as it cannot be the beginning of a mark, and arguments, which are JSON, as they come. What
looked like a call and is none is text after all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, TypeAlias

from starling.engine.text.tool_arguments import JsonValue, read_braces
from starling.engine.text.tool_formats import ToolFormat


@dataclass(frozen=True, slots=True)
class CallPiece:
    """A piece of a call. Its first piece has the `name`; the `arguments` of all of them joined are JSON."""

    index: int
    name: str | None
    arguments: str


#: Text of the answer, or a piece of a call.
Piece: TypeAlias = str | CallPiece

_STRING = r'"(?:[^"\\]|\\.)*"'
#: The beginning of a call's object, up to where its arguments begin.
_HEAD = re.compile(
    rf'\s*\{{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*({_STRING})\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\S)'
)


class ToolParser:
    """One answer's: `push` its text, then `flush` once."""

    def __init__(self, known: ToolFormat, names: Collection[str], *, parallel: bool = True) -> None:
        """`names` are those of the functions; without `parallel` what comes after the first call is left out."""
        self._format, self._names, self._parallel = known, names, parallel
        #: What has come and was not handed on.
        self._buffer = ""
        self._done = False
        self._pieces: list[Piece] = []
        #: Calls that have begun.
        self.calls = 0
        #: Looks for the end of a call's object, or of its arguments; how much of the buffer it has seen.
        self._value, self._seen = JsonValue(), 0
        self._quoted = False
        self._step = self._before_answer if known.style == "answer" else self._text

    def push(self, text: str) -> list[Piece]:
        """What is certain now."""
        self._buffer += text
        return self._run()

    def flush(self) -> list[Piece]:
        """What was held back."""
        self._done = True
        return self._run()

    def _run(self) -> list[Piece]:
        while self._step():
            pass
        pieces, self._pieces = self._pieces, []
        return pieces

    # Each step takes what it can from the buffer; it says whether another one may go on with the rest.

    def _text(self) -> bool:
        begin = self._format.begin
        at = self._buffer.find(begin)
        if at >= 0:
            self._give(len(self._buffer[:at].rstrip()))
            self._buffer = self._buffer[self._buffer.find(begin) + len(begin) :]
            self._begin_call()
            return True
        if self._done:
            self._give(len(self._buffer))
        else:
            # Spaces before a call are no part of the text.
            self._give(len(self._buffer[: len(self._buffer) - _begun(self._buffer, begin)].rstrip()))
        return False

    def _begin_call(self) -> None:
        self._value, self._seen = JsonValue(), 0
        steps = {"objects": self._object, "list": self._list, "named": self._name, "braces": self._braces}
        self._step = steps.get(self._format.style, self._object)

    def _before_answer(self) -> bool:
        """Whether the answer is a call: with the mark, or an object."""
        text, begin = self._buffer.lstrip(), self._format.begin
        if text.startswith(begin):
            self._buffer = text[len(begin) :]
            self._begin_call()
        elif text.startswith("{"):
            self._begin_call()
        elif self._done or not begin.startswith(text):
            self._step = self._rest
        else:
            return False
        return True

    def _rest(self) -> bool:
        """Nothing but text comes."""
        self._give(len(self._buffer))
        return False

    def _list(self) -> bool:
        text = self._buffer.lstrip()
        if text.startswith("["):
            self._buffer = text[1:]
            self._step = self._object
            return True
        return self._no_call() if text or self._done else False

    def _object(self) -> bool:
        """A call's object up to its arguments, or the whole of it where its name does not stand first."""
        if head := _HEAD.match(self._buffer):
            name = _loaded(head[1])
            if self._is_known(name):
                self._buffer = self._buffer[head.end() :]
                self._begin_arguments(str(name))
                return True
        end = self._value_end()
        if end is None:
            text = self._buffer.lstrip()
            return self._no_call() if self._done or (text and not text.startswith("{")) else False
        call = _loaded(self._buffer[:end])
        name = call.get("name") if isinstance(call, dict) else None
        if not isinstance(call, dict) or not isinstance(name, str) or not self._is_known(name):
            return self._no_call()
        arguments = call.get("arguments", call.get("parameters", {}))
        self._buffer = self._buffer[end:]
        self._give_call(name, arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))
        self._step = self._after
        return True

    def _is_known(self, name: Any) -> bool:
        """An answer that is JSON may be one for its reader: only a function's name makes it a call."""
        return isinstance(name, str) and (self._format.style != "answer" or name in self._names)

    def _name(self) -> bool:
        mark = self._format.mark
        at = self._buffer.find(mark)
        brace = self._buffer.find("{")
        if at < 0 and brace < 0:
            return self._no_call() if self._done else False
        end, start = (at, at + len(mark)) if at >= 0 and (brace < 0 or at < brace) else (brace, brace)
        name = self._buffer[:end]
        for other in self._format.others:
            name = name.partition(other)[0]
        self._buffer = self._buffer[start:]
        self._begin_arguments(name.strip())
        return True

    def _braces(self) -> bool:
        end = self._buffer.find(self._format.end)
        if end < 0:
            return self._no_call() if self._done else False
        name, brace, arguments = self._buffer[:end].strip().removeprefix("call:").partition("{")
        try:
            read = read_braces(brace + arguments, self._format.mark)
        except (ValueError, RecursionError):
            return self._no_call()
        self._buffer = self._buffer[end + len(self._format.end) :]
        self._give_call(name.strip(), json.dumps(read, ensure_ascii=False))
        self._step = self._text
        return True

    def _begin_arguments(self, name: str) -> None:
        self._give_call(name, "")
        self._value, self._seen = JsonValue(), 0
        # Some models write the arguments as a string that has the JSON.
        self._quoted = self._buffer.lstrip().startswith('"')
        self._step = self._arguments

    def _arguments(self) -> bool:
        end = self._value_end()
        whole = end is not None or self._done
        text = self._buffer[: len(self._buffer) if end is None else end]
        if self._quoted:
            if not whole:
                return False
            inner = _loaded(text)
            self._give_arguments(inner if isinstance(inner, str) else text)
        else:
            self._give_arguments(text)
        self._buffer, self._seen = self._buffer[len(text) :], 0
        if whole:
            self._value = JsonValue(depth=1)
            self._step = self._close if self._format.style in ("list", "answer") else self._after
        return whole

    def _close(self) -> bool:
        """What else the call's object has, an id for example."""
        end = self._value_end()
        if end is None:
            return False
        self._buffer, self._step = self._buffer[end:], self._after
        return True

    def _after(self) -> bool:
        """What stands between a call's arguments and what comes next."""
        style, text = self._format.style, self._buffer
        if style == "named":
            self._step = self._text
            return True
        if style == "objects":
            end = text.find(self._format.end)
            if end < 0:
                return False
            self._buffer, self._step = text[end + len(self._format.end) :], self._text
            return True
        text = text.lstrip()
        if not text:
            return False
        self._value, self._seen = JsonValue(), 0
        if text[0] == (";" if style == "answer" else ","):
            self._buffer, self._step = text[1:], self._object
        else:
            self._buffer = text.removeprefix("]") if style == "list" else text
            self._step = self._text if style == "list" else self._rest
        return True

    def _no_call(self) -> bool:
        """What began like a call is text."""
        self._buffer = ("" if self._format.style == "answer" else self._format.begin) + self._buffer
        self._step = self._rest
        return True

    def _value_end(self) -> int | None:
        """Where the value at the buffer's beginning ends."""
        end = self._value.end(self._buffer[self._seen :])
        found = None if end is None else self._seen + end
        self._seen = len(self._buffer)
        return found

    def _give(self, length: int) -> None:
        text, self._buffer = self._buffer[:length], self._buffer[length:]
        if self.calls and (not self._parallel or not text.strip()):
            return
        if text:
            self._pieces.append(text)

    def _give_call(self, name: str, arguments: str) -> None:
        self.calls += 1
        if self._parallel or self.calls == 1:
            self._pieces.append(CallPiece(self.calls - 1, name, arguments))

    def _give_arguments(self, text: str) -> None:
        if text and (self._parallel or self.calls == 1):
            self._pieces.append(CallPiece(self.calls - 1, None, text))


def _begun(text: str, mark: str) -> int:
    """Characters at the end of the text that may be the beginning of a mark."""
    return next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:size])), 0)


def _loaded(text: str) -> Any:
    """What JSON says, None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
