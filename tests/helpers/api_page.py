"""docs/api.md, the Python API, from its docstrings; `python tests/helpers/api_page.py` writes the page."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any, get_overloads

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
HEAD = """\
# Python API

Written from the docstrings by `python tests/helpers/api_page.py`; `tests/project/test_api_page.py` fails where it is
not up to date. What is not on this page may change at any time. An example is in the [README](../README.md#use); the
words are those of [architecture.md](architecture.md#words).

Shapes are in brackets, times in seconds unless a name ends in `_ms`, sizes in bytes. Starling is typed (`py.typed`).
"""
#: Sections with their classes, each by its module below `starling.`.
SECTIONS: dict[str, list[tuple[str, str]]] = {
    "Generating": [
        *(("engine", "Engine"), ("engine", "SamplingParams"), ("engine", "GenerationResult"), ("engine", "Timings")),
        *(("engine.generation.sampler", "TokenLogprob"), ("engine.batching.generation_stream", "GenerationStream")),
        *(("engine", "GenerationChunk"), ("engine.generation.results", "GenerationInterrupted")),
        *(
            ("engine", "GrammarSpec"),
            ("engine", "ChatSession"),
            ("engine.generation.continuation_scores", "ContinuationScore"),
        ),
    ],
    "Serving many requests": [
        *(("engine.serving_loop", "ServingLoop"), ("engine.batching.request", "RequestHandle")),
        ("engine.batching.serving_stats", "ServingStats"),
    ],
    "Bundles": [
        *(
            ("engine", "Bundle"),
            ("engine.bundle.model_records", "Architecture"),
            ("engine.bundle.model_records", "Quantization"),
        ),
    ],
    "Exporting": [
        ("export.checkpoints.model_source", "open_checkpoint"),
        *(("export.exporter", "export_bundle"), ("export.exporter", "ExportOptions")),
        *(("export.quantization.blocks", "BlockQuantization"), ("export.quantization.qdq_settings", "QdqQuantization")),
    ],
}
#: Classes that a program makes itself; it is given the others, or they are dataclasses.
MADE = {"Engine", "ServingLoop"}
#: Members for other parts of Starling, and for `with`.
INTERNAL = {
    *("reserve", "release", "prepare", "displace", "backend", "chat_templates"),
    *("blocks", "block_for", "bits", "weights", "activations", "to_json"),
}
#: Types that are words, by their module; the comment above them says what the words mean.
WORDS = {"engine.generation.results": "FinishReason", "engine.generation.prompts": "Prompt"}


def page() -> str:
    """The whole page."""
    sections = [*(line for title in SECTIONS for line in _section(title)), *_words(), *_errors()]
    return "\n".join([HEAD, *sections]).rstrip() + "\n"


def _section(title: str) -> Iterator[str]:
    yield f"## {title}\n"
    for module, name in SECTIONS[title]:
        found = getattr(import_module(f"starling.{module}"), name)
        yield f"### {name}\n"
        yield f"`from starling.{module} import {name}`\n"
        if isinstance(found, FunctionType):
            yield from _function(name, found)
        else:
            yield from _class(name, found)


def _class(name: str, found: type) -> Iterator[str]:
    made: Any = found
    if name in MADE:
        yield from _signature(name, made.__init__, with_result=False)
    yield _text(found)
    if name in MADE:
        yield _text(made.__init__)
    if dataclasses.is_dataclass(found) or issubclass(found, tuple):
        yield from _fields(found)
    yield from _properties(found)
    for member, value in _members(found):
        function = value.__func__ if isinstance(value, staticmethod) else value
        if inspect.isfunction(function) and not member.startswith("_") and member not in INTERNAL:
            yield f"#### {name}.{member}\n"
            yield from _function(member, function)


def _members(found: type) -> Iterator[tuple[str, Any]]:
    """Its own, then those that it has of our other classes."""
    names: set[str] = set()
    for base in found.__mro__:
        if base.__module__.startswith("starling."):
            yield from ((name, value) for name, value in vars(base).items() if name not in names)
            names |= vars(base).keys()


def _fields(found: type) -> Iterator[str]:
    """The table of a dataclass or a named tuple: name, type, default, and the comment above the field."""
    comments = _comments(found)
    yield "| field | type | default | |"
    yield "|---|---|---|---|"
    for name, annotation, default in _declared(found):
        if not name.startswith("_"):
            kind, comment = _type(annotation, in_table=True), comments.get(name, "")
            shown = "" if default is dataclasses.MISSING else f"`{default!r}`"
            yield f"| `{name}` | `{kind}` | {shown} | {comment} |"
    yield ""


def _declared(found: Any) -> list[tuple[str, Any, Any]]:
    """Name, type and default (MISSING: none) of each field."""
    if dataclasses.is_dataclass(found):
        return [(field.name, field.type, field.default) for field in dataclasses.fields(found)]
    defaults = found._field_defaults
    types = {name: getattr(kind, "__forward_arg__", kind) for name, kind in found.__annotations__.items()}
    return [(name, types[name], defaults.get(name, dataclasses.MISSING)) for name in found._fields]


def _comments(found: type) -> dict[str, str]:
    """The `#:` comment above each field; of fields that stand together, the first one's."""
    comments: dict[str, str] = {}
    lines: list[str] = []
    for line in inspect.getsource(found).splitlines():
        if match := re.match(r"\s+#: (.*)", line):
            lines.append(match[1])
        elif lines and (match := re.match(r"\s+(\w+):", line)):
            comments[match[1]] = " ".join(lines).replace("|", "\\|")
            lines = []
    return comments


def _properties(found: type) -> Iterator[str]:
    members = [
        (name, value)
        for name, value in _members(found)
        if isinstance(value, property | cached_property) and not name.startswith("_") and name not in INTERNAL
    ]
    if members:
        yield "| property | type | |"
        yield "|---|---|---|"
    for name, value in members:
        getter = value.func if isinstance(value, cached_property) else value.fget
        kind = _type(inspect.signature(getter).return_annotation, in_table=True)  # type: ignore[arg-type]
        yield f"| `{name}` | `{kind}` | {' '.join(inspect.cleandoc(getter.__doc__ or '').split())} |"
    if members:
        yield ""


def _function(name: str, function: FunctionType) -> Iterator[str]:
    for variant in get_overloads(function) or [function]:
        yield from _signature(name, variant)
    yield _text(function)


def _signature(name: str, function: Any, *, with_result: bool = True) -> Iterator[str]:
    signature = inspect.signature(function)
    kept = [parameter for parameter in signature.parameters.values() if parameter.name != "self"]
    parts = [_parameter(parameter) for parameter in kept]
    first = next((index for index, parameter in enumerate(kept) if parameter.kind is parameter.KEYWORD_ONLY), None)
    if first is not None:
        parts.insert(first, "*")
    result = f" -> {_type(signature.return_annotation)}" if with_result else ""
    line = f"{name}({', '.join(parts)}){result}"
    if len(line) > 110:
        line = f"{name}(\n    " + ",\n    ".join(parts) + f",\n){result}"
    yield f"```text\n{line}\n```\n"


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
    return f"{stars}{parameter.name}: {_type(parameter.annotation)}{default}"


def _type(annotation: Any, *, in_table: bool = False) -> str:
    """An annotation as it is written, without modules."""
    text = annotation.__qualname__ if type(annotation) is type else str(annotation)
    text = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", text)
    return text.replace("|", "\\|") if in_table else text


def _text(documented: Any) -> str:
    """A docstring: its lines `name: meaning` as a list, its examples as text."""
    text = inspect.cleandoc(documented.__doc__ or "")
    text = re.sub(r"^([a-z_]+|[A-Z]\w+Error): ", r"- `\1`: ", text, flags=re.MULTILINE)
    text = re.sub(r"^Raises:\n((?: +.*\n?)+)", lambda found: "Raises:\n\n" + _list(found[1]), text, flags=re.MULTILINE)
    return text.replace("```python", "```text") + "\n"


def _list(lines: str) -> str:
    return re.sub(r"^ *(\w+): ", r"- `\1`: ", textwrap.dedent(lines), flags=re.MULTILINE)


def _words() -> Iterator[str]:
    """What the types are that stand for a few words or forms."""
    yield "## Types"
    yield ""
    for module, name in WORDS.items():
        source = inspect.getsource(import_module(f"starling.{module}"))
        found = re.search(rf"((?:^#: .*\n)+)^{name}\b[^=]*= (.+)$", source, re.MULTILINE)
        assert found, f"{module} has no comment above {name}"
        yield f"`{name}` = `{found[2]}`\n"
        yield re.sub(r"^#: ", "", found[1], flags=re.MULTILINE)


def _errors() -> Iterator[str]:
    """The hierarchy of the errors, with the exit code of the command line."""
    errors = import_module("starling.engine.errors")
    yield "## Errors\n"
    yield "`from starling.engine.errors import …`; `StarlingError` is in `starling.engine` too.\n"
    yield inspect.cleandoc(errors.__doc__ or "") + "\n"
    yield "| error | is a | exit code | |"
    yield "|---|---|---|---|"
    for name, found in vars(errors).items():
        if isinstance(found, type) and issubclass(found, errors.StarlingError):
            base = found.__bases__[0].__name__
            text = " ".join(inspect.cleandoc(found.__doc__ or "").split())
            yield f"| `{name}` | `{base}` | {found.exit_code} | {text} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE}: {len(page().splitlines())} lines", file=sys.stderr)
