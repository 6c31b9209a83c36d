"""What the measuring programs (`python -m starling.profiling…`) have in common: how they fail, and what they write."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from starling.engine.errors import StarlingError


@contextmanager
def failing_in_one_line() -> Iterator[None]:
    """A StarlingError becomes one line on stderr and the program's exit code."""
    try:
        yield
    except StarlingError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from error


def write_document(document: dict[str, Any], output: Path | None) -> None:
    """Write the JSON document that a measurement is, where a file was named for it."""
    if output is not None:
        output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
