"""What a request says an answer must look like: OpenAI's `response_format`, and vLLM's names old and new."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from starling.engine.errors import SamplingError, shown
from starling.engine.text.grammar import GrammarSpec
from starling.serving.api.api_errors import bad_field, from_engine
from starling.serving.api.fields import Fields

#: Each wants a value that its reader takes: a JSON schema as an object or as text, an expression, texts, a grammar.
_READERS: dict[str, Callable[[Any], GrammarSpec]] = {
    "json": GrammarSpec.json_schema,
    "regex": GrammarSpec.regex,
    "choice": GrammarSpec.choice,
    "grammar": GrammarSpec.lark,
}
GRAMMAR_FIELDS = frozenset({"response_format", "structured_outputs", *(f"guided_{name}" for name in _READERS)})
#: Those of vLLM's `SamplingParams`, today's and before.
VLLM_FIELDS = GRAMMAR_FIELDS - {"response_format"} | {"guided_decoding"}
#: Members of vLLM's objects that say how, with what changes nothing here: whitespace is always fixed.
_MANNERS: dict[str, tuple[object, ...]] = {
    "disable_fallback": (True, False),
    "disable_any_whitespace": (True, False),
    "disable_additional_properties": (False,),
    "whitespace_pattern": (),
}
#: TensorRT-LLM's words; `json` is any object.
GUIDE_TYPES = {"json": "json", "json_schema": "json", "regex": "regex", "ebnf_grammar": "grammar"}
_TYPES = ("text", "json_object", "json_schema")


def read_grammar(fields: Fields) -> GrammarSpec | None:
    """The grammar of a request, None where it asks for none.

    Raises ApiError that names the field, and the second one of two.
    """
    found = [(name, spec) for name in sorted(GRAMMAR_FIELDS | VLLM_FIELDS) if (spec := _read(fields, name)) is not None]
    if len(found) > 1:
        problem = f"{found[0][0]} and {found[1][0]} both say what the answer must look like: send one"
        raise bad_field(found[1][0], problem, "invalid_value")
    return found[0][1] if found else None


def _read(fields: Fields, name: str) -> GrammarSpec | None:
    if name not in fields.values:
        return None
    if name == "response_format":
        return _response_format(Fields(fields.required(name, dict)))
    if name in ("structured_outputs", "guided_decoding"):
        return _one_of(Fields(fields.required(name, dict)), name)
    return spec_of(name.removeprefix("guided_"), fields.values[name], name)


def _response_format(form: Fields) -> GrammarSpec | None:
    kind = form.values.get("type")
    if kind not in _TYPES:
        problem = f"response_format.type is {shown(kind)}: give one of {', '.join(_TYPES)}"
        raise bad_field("response_format.type", problem, "invalid_value")
    if kind == "text":
        return None
    if kind == "json_object":
        return replace(GrammarSpec.json_object(), field="response_format")
    named = form.values.get("json_schema")
    if not isinstance(named, dict):
        problem = "response_format.json_schema is missing or no object: give a name and a schema"
        raise bad_field("response_format.json_schema", problem, "missing_required_parameter")
    # OpenAI's API makes a schema optional, and decodes under it only with `strict`; without that it is held to as well.
    return spec_of("json", named.get("schema", {"type": "object"}), "response_format.json_schema.schema")


def _one_of(given: Fields, field: str) -> GrammarSpec | None:
    known = [*_READERS, "json_object", *_MANNERS]
    for name in given.values:
        if name not in known:
            raise bad_field(field, f"{field} has {shown(name)}: give one of {', '.join(known)}", "unknown_parameter")
    for name, neutral in _MANNERS.items():
        if name in given.values and given.values[name] not in neutral:
            place = f"{field}.{name}"
            raise bad_field(place, f"{place} is not supported: leave it out", "unsupported_parameter")
    found = [spec_of(name, value, f"{field}.{name}") for name, value in given.values.items() if name in _READERS]
    if given.get("json_object", bool, False):
        found.append(replace(GrammarSpec.json_object(), field=f"{field}.json_object"))
    if len(found) > 1:
        problem = f"{found[0].field} and {found[1].field} both say what the answer must look like: send one"
        raise bad_field(found[1].field, problem, "invalid_value")
    return found[0] if found else None


def spec_of(kind: str, value: Any, field: str) -> GrammarSpec:
    """The grammar of a value of `json`, `regex`, `choice` or `grammar`. Raises ApiError that names `field`."""
    wanted = {"json": (dict, str, bool), "choice": (list,)}.get(kind, (str,))
    if not isinstance(value, wanted):
        words = {"json": "an object or its JSON", "choice": "a list of strings"}.get(kind, "a string")
        raise bad_field(field, f"{field} is of the wrong type: give {words}", "invalid_type")
    try:
        return replace(_READERS[kind](value), field=field)
    except SamplingError as error:
        error.field = field
        raise from_engine(error, "") from None


def guided_by_type(kind: str, guide: str, field: str) -> GrammarSpec:
    """TensorRT-LLM's two inputs, the type and the guide. Raises ApiError that names `field`."""
    if kind == "json":
        return replace(GrammarSpec.json_object(), field=field)
    if kind not in GUIDE_TYPES:
        raise bad_field(field, f"{field} is {shown(kind)}: give one of {', '.join(GUIDE_TYPES)}", "invalid_value")
    return spec_of(GUIDE_TYPES[kind], guide, field)
