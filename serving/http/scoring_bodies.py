"""What a client asks of a model that scores or embeds: the bodies of its endpoints, in vLLM's and OpenAI's shapes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from starling.engine.bundle.model_records import Side
from starling.engine.errors import shown
from starling.engine.names import Task
from starling.engine.pooling.text_pooler import TextInput
from starling.serving.api.api_errors import ApiError, bad_field
from starling.serving.api.fields import LIKE_A_KNOWN, Fields
from starling.serving.api.messages import read_messages
from starling.serving.api.sampling_fields import read_deadline

#: Texts of one request.
MOST_TEXTS = 2048
#: Says nothing about the answer.
IGNORED_SCORING = frozenset({"user", "priority", "request_id"})
_COMMON = IGNORED_SCORING | {"model", "template", "truncate_prompt_tokens", "truncation_side", "deadline_s"}
_INPUT = _COMMON | {"input", "messages"}
_PAIRS = _COMMON | {"use_activation"}
#: The fields of each endpoint, by its name in the code.
SCORING_FIELDS: dict[str, frozenset[str]] = {
    "classify": _INPUT | {"use_activation"},
    "pooling": _INPUT | {"use_activation", "task", "encoding_format"},
    "embeddings": _INPUT | {"use_activation", "encoding_format", "dimensions"},
    "score": _PAIRS | {"text_1", "text_2", "queries", "documents"},
    "rerank": _PAIRS | {"query", "documents", "top_n", "return_documents"},
}
#: vLLM's words for what /pooling is asked for, and the task of the bundle that gives it.
POOLING_TASKS: Mapping[str, Task] = {"classify": "score", "score": "score", "embed": "embed"}
_SIDES = ("left", "right")

#: A question and an answer, which the model reads together.
Pair: TypeAlias = tuple[str, str]


@dataclass(frozen=True, slots=True)
class ScoringRequest:
    """One request, checked but for its texts' lengths. `field` is the one that an error in a text names."""

    texts: Sequence[TextInput | Pair]
    field: str
    model: str
    template: str | None = None
    truncate: int | None = None
    side: Side | None = None
    deadline_s: float | None = None
    #: Whether scores become probabilities, and embeddings are normalized.
    activation: bool = False
    base64: bool = False
    top_n: int | None = None
    return_documents: bool = True
    ignored: tuple[str, ...] = ()


#: Reads a body, for one of `models`.
Reader: TypeAlias = Callable[[Mapping[str, Any], Sequence[str]], ScoringRequest]


def classify_request(document: Mapping[str, Any], models: Sequence[str]) -> ScoringRequest:
    """The body of /classify. Raises ApiError that names the field."""
    fields, common = _begin(document, "classify", models)
    return ScoringRequest(*_input(fields), **common, activation=fields.get("use_activation", bool, False))


def pooling_request(document: Mapping[str, Any], models: Sequence[str], task: Task) -> ScoringRequest:
    """The body of /pooling, of a model for `task`. Raises ApiError that names the field."""
    fields, common = _begin(document, "pooling", models)
    wanted = fields.optional("task", str)
    if wanted is not None and POOLING_TASKS.get(wanted) != task:
        known = " or ".join(name for name, own in POOLING_TASKS.items() if own == task)
        raise bad_field("task", f"task is {shown(wanted)}: this model's is {known}", "invalid_value")
    activation = fields.get("use_activation", bool, False)
    return ScoringRequest(*_input(fields), **common, activation=activation, base64=_base64(fields))


def embedding_request(document: Mapping[str, Any], models: Sequence[str], normalize: bool) -> ScoringRequest:
    """The body of /v1/embeddings; without `use_activation` vectors have length 1 where `normalize`. Raises ApiError."""
    fields, common = _begin(document, "embeddings", models)
    if "dimensions" in fields.values:
        raise bad_field("dimensions", "dimensions is not supported: the vectors are given whole, cut them yourself")
    activation = fields.get("use_activation", bool, normalize)
    return ScoringRequest(*_input(fields), **common, activation=activation, base64=_base64(fields))


def score_request(document: Mapping[str, Any], models: Sequence[str]) -> ScoringRequest:
    """The body of /score: one text with each of several, or two lists pair by pair. Raises ApiError."""
    fields, common = _begin(document, "score", models)
    names = ("queries", "documents") if "queries" in fields.values else ("text_1", "text_2")
    first, second = (_texts(fields, name) for name in names)
    if len(first) == 1:
        first = first * len(second)
    if len(first) != len(second):
        problem = f"{names[0]} has {len(first)} texts, {names[1]} has {len(second)}: give one, or as many"
        raise bad_field(names[0], problem, "invalid_value")
    activation = fields.get("use_activation", bool, False)
    return ScoringRequest(list(zip(first, second, strict=True)), names[1], **common, activation=activation)


def rerank_request(document: Mapping[str, Any], models: Sequence[str]) -> ScoringRequest:
    """The body of /rerank, in Cohere's shape too. Raises ApiError that names the field."""
    fields, common = _begin(document, "rerank", models)
    query, documents = fields.required("query", str), _texts(fields, "documents", objects=True)
    top_n = fields.optional("top_n", int)
    if top_n is not None and top_n < 0:
        raise bad_field("top_n", f"top_n is {shown(top_n)}: give 0 (all) or more", "invalid_value")
    return ScoringRequest(
        [(query, text) for text in documents],
        "documents",
        **common,
        activation=fields.get("use_activation", bool, False),
        top_n=top_n or None,
        return_documents=fields.get("return_documents", bool, True),
    )


def _begin(document: Mapping[str, Any], endpoint: str, models: Sequence[str]) -> tuple[Fields, dict[str, Any]]:
    """The fields, none of them unknown, and what every request says."""
    fields, known = Fields(document), SCORING_FIELDS[endpoint]
    others = _other_fields(known)
    ignored = fields.refuse_unknown(known, elsewhere=others, least=LIKE_A_KNOWN)
    model = fields.get("model", str, models[0])
    if model not in models:
        problem = f"there is no model {shown(model)} here that scores or embeds: use {' or '.join(models)}"
        raise ApiError(404, problem, param="model", code="model_not_found")
    return fields, {"model": model, "deadline_s": read_deadline(fields), "ignored": ignored, **reading_of(fields)}


def reading_of(fields: Fields) -> dict[str, Any]:
    """How texts are to be read: template, truncate and side of `TextPooler.prepare`. Raises ApiError."""
    side = fields.optional("truncation_side", str)
    if side is not None and side not in _SIDES:
        raise bad_field("truncation_side", f"truncation_side is {shown(side)}: give left or right", "invalid_value")
    return {
        "template": fields.optional("template", str),
        "truncate": fields.optional("truncate_prompt_tokens", int),
        "side": cast("Side | None", side),
    }


def _other_fields(known: Collection[str]) -> set[str]:
    return {name for names in SCORING_FIELDS.values() for name in names if name not in known}


def _input(fields: Fields) -> tuple[list[TextInput], str]:
    """The texts of `input`, or the chat of `messages`, and the name of the field."""
    if "messages" in fields.values:
        if "input" in fields.values:
            raise bad_field("input", "input is given beside messages: give one of them")
        return [read_messages(fields)], "messages"
    value = fields.values.get("input")
    if value is None:
        raise bad_field("input", "input is missing: give a text, or a list of texts", "missing_required_parameter")
    several = isinstance(value, list) and value and isinstance(value[0], str | list)
    texts = value if several else [value]
    for text in texts:
        is_ids = isinstance(text, list) and text and all(type(token) is int for token in text)
        if not isinstance(text, str) and not is_ids:
            raise bad_field("input", "input is neither a text nor a list of token ids, nor a list of those")
    return not_too_many(texts, "input"), "input"


def _texts(fields: Fields, name: str, *, objects: bool = False) -> list[str]:
    """A text or a list of texts; with `objects` a text may be {"text": …}."""
    value = fields.values.get(name)
    if value is None:
        raise bad_field(name, f"{name} is missing: give a text or a list of texts", "missing_required_parameter")
    given = value if isinstance(value, list) else [value]
    texts = [item.get("text") if objects and isinstance(item, dict) else item for item in given]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise bad_field(name, f"{name} is neither a text nor a list of texts", "invalid_type")
    return not_too_many(texts, name)


def not_too_many(texts: list[Any], name: str) -> list[Any]:
    """The texts of the field `name`. Raises ApiError where a request may not have so many."""
    if len(texts) > MOST_TEXTS:
        problem = f"{name} has {len(texts)} texts: a request takes {MOST_TEXTS}, send several"
        raise bad_field(name, problem, "invalid_value")
    return texts


def _base64(fields: Fields) -> bool:
    encoding = fields.get("encoding_format", str, "float")
    if encoding not in ("float", "base64"):
        problem = f"encoding_format is {shown(encoding)}: give float or base64"
        raise bad_field("encoding_format", problem, "invalid_value")
    return encoding == "base64"
