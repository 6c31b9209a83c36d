"""What commands print: JSON for programs, sizes and durations for people, notes on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from starling.engine.errors import PromptError

#: Columns of a terminal that does not say; and the fewest for the text beside a name.
USUAL_WIDTH, LEAST_TEXT = 80, 20


def print_json(document: Mapping[str, Any]) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(document, ensure_ascii=False))


def note(text: str) -> None:
    """A line for the person at the terminal, on stderr, so that stdout holds nothing but the result."""
    click.secho(text, err=True, dim=True)


def screen_width() -> int | None:
    """Columns of the terminal that stdout is, or as COLUMNS says; None where a pipe or a file knows of none."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns) > 0:
        return int(columns)
    if not sys.stdout.isatty():
        return None
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or USUAL_WIDTH
    except (OSError, ValueError):
        return USUAL_WIDTH


def print_rows(rows: Iterable[tuple[str, str]]) -> None:
    """Names and the text of each; for a terminal a long text goes on below its own beginning."""
    listed = list(rows)
    width = max(len(name) for name, _ in listed)
    for name, text in listed:
        print_hanging(click.style(name.ljust(width), bold=True), width, text)


def print_hanging(mark: str, width: int, text: str) -> None:
    """`mark`, which takes `width` columns, and the text beside it. No word is cut: paths and digests can be copied."""
    from starling.profiling.reports.folding import fold

    columns, indent = screen_width(), width + 2
    lines = [text] if columns is None else fold(text, max(columns - indent, LEAST_TEXT))
    click.echo(f"{mark}  {lines[0]}")
    for line in lines[1:]:
        click.echo(" " * indent + line)


def human_bytes(count: float) -> str:
    """A size in decimal units, as disks and bandwidths are given: 540.3 MB."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def human_seconds(seconds: float) -> str:
    """A duration in the unit that a person would choose: 41 ms, 1.3 s, 2 min 5 s."""
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def read_text(source: Path | None, kind: str = "prompt") -> str:
    """The text of a file, or of stdin for None, without the line end that closes it.

    Raises PromptError where the file cannot be read or is not UTF-8.
    """
    name = "stdin" if source is None else str(source)
    try:
        content = sys.stdin.buffer.read() if source is None else source.read_bytes()
    except OSError as error:
        raise PromptError(f"{name} cannot be read: {error.strerror or error}; give another {kind} file") from error
    return decode_utf8(content, name).removesuffix("\n").removesuffix("\r")


def decode_utf8(content: bytes, name: str) -> str:
    """The text of `content`, which came from `name`. Raises PromptError where it is not UTF-8."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise PromptError(
            f"{name} is not UTF-8 text (byte 0x{byte:02x} at offset {error.start}): convert it to UTF-8"
        ) from error
