"""What an answer must look like: a JSON schema, any JSON object, a regular expression, a choice, or a grammar."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from starling.engine.errors import SamplingError, one_line, shown

GrammarKind = Literal["json_schema", "json_object", "regex", "choice", "lark"]
GRAMMAR_KINDS: tuple[GrammarKind, ...] = get_args(GrammarKind)
#: Characters of a grammar, and members of an object: 2,000 that may be left out take a second to compile.
MOST_CHARACTERS, MOST_MEMBERS = 2**17, 2000

#: As models write JSON on one line. Free whitespace lets a small model write it without end.
JSON_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """What an answer must look like, as its author wrote it; whether it can be decoded under, generating says.

    Made by `GrammarSpec.json_schema(schema)`, `.json_object()`, `.regex(pattern)`, `.choice(texts)` or
    `.lark(grammar)`, each of which raises SamplingError for what is no grammar.
    """

    kind: GrammarKind
    #: The schema or the list of choices as JSON, the expression, the grammar; "" for any JSON object.
    text: str = ""
    #: What errors call it: the field of a request that had it.
    field: str = dataclasses.field(default="grammar", compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in GRAMMAR_KINDS:
            raise _refusal(f"the kind of grammar is {shown(self.kind)}", f"give one of {', '.join(GRAMMAR_KINDS)}")
        if not isinstance(self.text, str) or bool(self.text) is (self.kind == "json_object"):
            raise _refusal(f"the text of a {self.kind} is {shown(self.text)}", "give a string, for json_object none")
        if len(self.text) > MOST_CHARACTERS:
            problem = f"the {self.kind} has {len(self.text):,} characters"
            raise _refusal(problem, f"give at most {MOST_CHARACTERS:,}")
        if not self.text.isprintable() and any("\ud800" <= char <= "\udfff" for char in self.text):
            raise _refusal(f"the {self.kind} holds half a surrogate pair", "give text that UTF-8 can hold")

    @classmethod
    def json_object(cls) -> GrammarSpec:
        """Any JSON object."""
        return cls("json_object")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str) -> GrammarSpec:
        """Documents of a JSON schema, which is given as JSON or as what JSON is read to.

        Members come in the schema's order, with one space after each `:` and `,` and no other whitespace. A schema
        with a keyword that cannot be held to is refused, not loosened.
        """
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError) as error:
                raise _refusal("the JSON schema is not JSON", _reason(error)) from None
        if schema is True:
            schema = {}
        if not isinstance(schema, Mapping):
            raise _refusal(f"the JSON schema is {shown(schema)}", "give an object")
        text = _json(dict(schema), "JSON schema")
        _check_members(schema)
        return cls("json_schema", text)

    @classmethod
    def regex(cls, pattern: str) -> GrammarSpec:
        """Texts that a regular expression matches from beginning to end, in the syntax of Rust's `regex`."""
        return cls("regex", pattern)

    @classmethod
    def choice(cls, texts: Sequence[str]) -> GrammarSpec:
        """One of these texts."""
        given = [] if isinstance(texts, str) else list(texts)
        if not given or not all(isinstance(text, str) and text for text in given):
            raise _refusal("the choice holds no text", "give a list of strings that are not empty")
        return cls("choice", _json(given, "choice"))

    @classmethod
    def lark(cls, grammar: str) -> GrammarSpec:
        """Texts of a context-free grammar in Lark's syntax, whose first rule is `start`, or in llama.cpp's GBNF."""
        return cls("lark", grammar)


def _check_members(schema: object) -> None:
    """Of every mapping in the schema, since any may be the properties of an object."""
    parts = [schema]
    while parts:
        part = parts.pop()
        if isinstance(part, Mapping):
            if len(part) > MOST_MEMBERS:
                problem = f"an object of the JSON schema has {len(part):,} members"
                raise _refusal(problem, f"give at most {MOST_MEMBERS:,}")
            parts += part.values()
        elif isinstance(part, list | tuple):
            parts += part


def _json(value: object, name: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise _refusal(f"the {name} is not JSON", _reason(error)) from None


def _reason(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else one_line(error)


def _refusal(problem: str, what_to_do: str) -> SamplingError:
    return SamplingError(problem, detail=what_to_do, field="grammar")
