"""The server's log on stderr: one form, text or JSON, for its own lines and for those of the libraries under it.

Nothing that a stranger sent can break a line or forge one: control characters are escaped, texts are bounded, and the
lines of a traceback are indented. A reader of stderr that stands still, or is gone, costs lines and never an answer.
"""

from __future__ import annotations

import json
import logging
import os
import re
import select
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("text", "json")
#: Most characters of one text in a line, and of a traceback, of which the end counts.
MOST_CHARACTERS = 500
MOST_OF_A_TRACEBACK = 20_000

#: Bytes that a pipe which is ready for writing takes without waiting (POSIX's least value of it is 512).
_AT_ONCE = getattr(select, "PIPE_BUF", 512)
_PLAIN = re.compile(r"[A-Za-z0-9._:/+=@,~%-]+")


def configure_logging(level: str, layout: str) -> None:
    """Send every logger's lines from `level` on to stderr, as "text" or "json"."""
    root = logging.getLogger()
    root.setLevel(level.upper())
    # None where the program was started with stderr closed: the number 2 may be any file then.
    handler = logging.NullHandler() if sys.stderr is None else DescriptorHandler(sys.stderr.fileno())
    handler.setFormatter(JsonLines() if layout == "json" else TextLines())
    root.handlers[:] = [handler]


def numeric(level: str) -> int:
    """The number of one of LEVELS, as `logging` has it."""
    return logging.getLevelNamesMapping()[level.upper()]


class DescriptorHandler(logging.Handler):
    """Writes lines to a file descriptor. Where it is not ready to take them they are dropped, and counted."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self._dropped = 0
        #: Whether the last thing written has no line end.
        self._torn = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line now, or never."""
        try:
            line = self.format(record)
            if self._dropped and self._write(self.format(_dropped(self._dropped))):
                self._dropped = 0
        except Exception:
            self.handleError(record)
            return
        if self._dropped or not self._write(line):
            self._dropped += 1

    def _write(self, line: str) -> bool:
        rest = ("\n" * self._torn + line + "\n").encode("utf-8", "backslashreplace")
        while rest:
            try:
                if not self._poll.poll(0):
                    return False
                rest = rest[os.write(self._descriptor, rest[:_AT_ONCE]) :]
            except OSError:  # its reader is gone, the disk is full
                return False
            self._torn = bool(rest)
        return True


class TextLines(logging.Formatter):
    """`TIME LEVEL LOGGER: MESSAGE key=value …`; a traceback follows on lines that begin with spaces."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, and those of a traceback."""
        message = escaped(bounded(record.getMessage().strip()))
        said = getattr(record, "in_message", ())
        shown = {name: value for name, value in _fields(record).items() if value is not None and name not in said}
        fields = "".join(f" {name}={_value(value)}" for name, value in shown.items())
        head = f"{_time(record)} {record.levelname} {record.name}: {message}{fields}"
        traceback = _traceback(self, record)
        return "\n    ".join([head, *map(escaped, (traceback or "").splitlines())])


class JsonLines(logging.Formatter):
    """One JSON object a line, in ASCII: time, level, logger, message, and what the record brings."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        document = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": bounded(record.getMessage().strip()),
            **{name: bounded(value) if isinstance(value, str) else value for name, value in _fields(record).items()},
        }
        traceback = _traceback(self, record)
        return json.dumps(document if traceback is None else document | {"traceback": traceback}, default=str)


def bounded(text: str) -> str:
    """The text, cut where it is too long for a line."""
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…"


def escaped(text: str) -> str:
    """The text on one line: what is not printable as \\n, \\x1b, \\u2028."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _value(value: object) -> str:
    """A field's value: quoted, with quotes and backslashes escaped, where it is not a plain word."""
    text = bounded(str(value))
    if _PLAIN.fullmatch(text):
        return text
    return '"' + escaped(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = getattr(record, "fields", {})
    return fields


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str | None:
    if not record.exc_info or record.exc_info[0] is None:
        return None
    return formatter.formatException(record.exc_info)[-MOST_OF_A_TRACEBACK:]


def _dropped(count: int) -> logging.LogRecord:
    message = f"{count} line(s) of the log were dropped, since stderr did not take them"
    return logging.LogRecord("starling.serve", logging.WARNING, __file__, 0, message, (), None)
