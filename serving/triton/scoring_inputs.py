"""A Triton request to a model that scores or embeds: texts, chats or token ids, and how they are to be read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import StarlingError
from starling.engine.names import Task
from starling.engine.pooling.text_pooler import PreparedText, TextInput, TextPooler
from starling.serving.api.api_errors import ApiError
from starling.serving.api.fields import Fields
from starling.serving.api.messages import read_messages
from starling.serving.http.scoring_bodies import not_too_many, reading_of
from starling.serving.triton.engine_socket import refusal
from starling.serving.triton.entry_inputs import Inputs, Tensor, check_names
from starling.serving.triton.socket_messages import PROMPT_LIMIT, RequestError

#: One of these has what is scored.
_TEXTS = ("text_input", "messages", "input_ids")
_READING = (
    Tensor("template", "STRING"),
    Tensor("truncate_prompt_tokens", "INT32"),
    Tensor("truncation_side", "STRING"),
)
INPUTS = (
    Tensor("text_input", "STRING", (-1,)),
    Tensor("messages", "STRING", (-1,)),
    Tensor("input_ids", "INT64", (-1,)),
    Tensor("input_lengths", "INT32", (-1,)),
    Tensor("use_activation", "BOOL"),
    *_READING,
)
#: The output with the numbers, by what the bundle is for.
NUMBERS: Mapping[Task, str] = {"score": "scores", "embed": "embeddings"}
TOKENS = "num_input_tokens"


def outputs_of(bundle: Bundle) -> tuple[Tensor, ...]:
    """The numbers [texts, width] of a request, and each text's tokens."""
    return Tensor(NUMBERS[bundle.task], "FP32", (-1, bundle.output_width)), Tensor(TOKENS, "UINT32", (-1,))


@dataclass(frozen=True, slots=True)
class ScoringCall:
    """A request as it was understood; `field` is the input that has the texts."""

    texts: Sequence[TextInput]
    field: str
    reading: Mapping[str, Any]
    activation: bool

    def prepared(self, pooler: TextPooler) -> list[PreparedText]:
        """The tokens of the texts. Raises RequestError, which names the input."""
        try:
            return [pooler.prepare(text, **self.reading) for text in self.texts]
        except StarlingError as error:
            found = refusal(error)
            field = "truncate_prompt_tokens" if error.field == "truncate" else self.field
            raise RequestError(f"{field}: {found}", found.kind) from None


def read_call(inputs: Inputs, parameters: Mapping[str, Any]) -> ScoringCall:
    """The call of a request. Raises RequestError, which names the input."""
    check_names(inputs, [tensor.name for tensor in INPUTS], parameters)
    given = [name for name in _TEXTS if name in inputs]
    if len(given) != 1:
        raise RequestError(f"{' and '.join(given) or 'no text'}: give one of {', '.join(_TEXTS)}")
    field = given[0]
    if field != "input_ids" and "input_lengths" in inputs:
        raise RequestError("input_lengths is for input_ids: leave it out")
    values = inputs.all(field)
    if not values:
        raise RequestError(f"{field} is empty: give at least one")
    _check_size(field, values)
    settings = Fields({tensor.name: inputs.one(tensor.name) for tensor in _READING})
    try:
        texts = not_too_many(_texts(field, values, inputs), field)
        return ScoringCall(texts, field, reading_of(settings), bool(inputs.one("use_activation", False)))
    except ApiError as error:
        raise RequestError(error.message) from None


def _texts(field: str, values: list[Any], inputs: Inputs) -> list[TextInput]:
    if field == "text_input":
        return values
    if field == "messages":
        return [_chat(index, text) for index, text in enumerate(values)]
    lengths = inputs.all("input_lengths") if "input_lengths" in inputs else [len(values)]
    if sum(lengths) != len(values) or min(lengths, default=0) < 0:
        raise RequestError(f"input_lengths do not add up to the {len(values)} ids of input_ids")
    ends = np.cumsum([0, *lengths]).tolist()
    return [values[start:end] for start, end in pairwise(ends)]


def _chat(index: int, text: str) -> TextInput:
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError):
        raise RequestError(f"messages: chat {index} is not JSON: give objects with role and content") from None
    try:
        return read_messages(Fields({"messages": messages}))
    except ApiError as error:
        raise RequestError(f"chat {index}: {error.message}") from None


def _check_size(field: str, values: Sequence[Any]) -> None:
    """No request holds more text than a prompt of the other entries may."""
    size = sum(len(value) if isinstance(value, str) else 1 for value in values)
    if size > PROMPT_LIMIT:
        what = "ids" if field == "input_ids" else "characters"
        raise RequestError(f"{field} has {size:,} {what} in all: give at most {PROMPT_LIMIT:,}")
