"""What commands print: JSON for programs, sizes and durations for people, notes on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from starling.engine.errors import PromptError


def print_json(document: Mapping[str, Any]) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(document, ensure_ascii=False))


def note(text: str) -> None:
    """A line for the person at the terminal, on stderr, so that stdout holds nothing but the result."""
    click.secho(text, err=True, dim=True)


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


def read_text(source: Path | None) -> str:
    """The text of a file, or of stdin for None, without the line end that closes it.

    Raises PromptError where the file cannot be read or is not UTF-8.
    """
    name = "stdin" if source is None else str(source)
    try:
        content = sys.stdin.buffer.read() if source is None else source.read_bytes()
    except OSError as error:
        raise PromptError(f"{name} cannot be read: {error.strerror or error}; give another prompt file") from error
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
