"""Options that say what an answer must look like, and the grammar they become."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from starling.cli.shared.output import read_text
from starling.engine.errors import UserError

if TYPE_CHECKING:
    from starling.engine.text.grammar import GrammarSpec

_OPTIONS = (
    click.option("--json-schema", metavar="FILE|JSON", help="Answer with a JSON document of this schema."),
    click.option("--json-object", is_flag=True, help="Answer with a JSON object."),
    click.option("--regex", help="Answer with a text that this expression (Rust's syntax) matches as a whole."),
    click.option("--choice", multiple=True, help="Answer with this text, or another --choice; repeatable."),
    click.option("--grammar", metavar="FILE|TEXT", help="Answer with a text of this grammar, in Lark or GBNF."),
)


def grammar_options(function: Callable[..., Any]) -> Any:
    """Adds the options to a command; at most one of them may be given."""
    return reduce(lambda inner, option: option(inner), reversed(_OPTIONS), function)


def grammar_of(values: Mapping[str, Any]) -> GrammarSpec | None:
    """The grammar of a command's options, None without any. Raises UserError for more than one, or a bad one."""
    names = ("json_schema", "json_object", "regex", "choice", "grammar")
    given = [name for name in names if values[name] not in (None, False, ())]
    if not given:
        return None
    if len(given) > 1:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserError(f"{options} both say what the answer must look like: give one")
    from starling.engine.text.grammar import GrammarSpec

    [name] = given
    if name == "json_object":
        return GrammarSpec.json_object()
    if name == "regex":
        return GrammarSpec.regex(values[name])
    if name == "choice":
        return GrammarSpec.choice(values[name])
    text = _text(values[name])
    return GrammarSpec.json_schema(text) if name == "json_schema" else GrammarSpec.lark(text)


def _text(value: str) -> str:
    """That of the file so named, or the text itself, which has a brace, a colon or a line end."""
    try:
        is_file = Path(value).is_file()
    except OSError:  # too long for a name
        is_file = False
    return value if not is_file and any(mark in value for mark in "{:\n") else read_text(Path(value), "grammar")
