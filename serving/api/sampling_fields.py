"""The sampling part of a request: OpenAI's fields, and the engine's own as extensions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starling.engine.errors import SamplingError, shown
from starling.engine.generation.sampling_params import SamplingParams, check_max_tokens
from starling.serving.api.api_errors import bad_field, from_engine
from starling.serving.api.fields import Fields, Unsupported

#: OpenAI's own limit on strings in `stop`.
MOST_STOPS = 4
MOST_LOGPROBS = 20

_PENALTY = "it is not supported; use repetition_penalty (above 1 makes repetition less likely)"
UNSUPPORTED_SAMPLING: Unsupported = {
    "presence_penalty": ((0,), _PENALTY),
    "frequency_penalty": ((0,), _PENALTY),
    "logit_bias": (({},), "it is not supported"),
}
SAMPLING_FIELDS = frozenset(
    {
        *("max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop"),
        *("top_k", "min_p", "repetition_penalty", "ignore_eos", "stop_token_ids", "deadline_s"),
        *UNSUPPORTED_SAMPLING,
    }
)
#: Fields that say nothing about the answer.
IGNORED_FIELDS = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})

_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty")


def read_sampling(
    fields: Fields, defaults: Mapping[str, Any], *, max_tokens: int, logprobs: int | None
) -> SamplingParams:
    """SamplingParams of a request. `defaults` are the values of fields left out, `max_tokens` of that one.

    Raises ApiError that names the field for a bad value, and for what is not supported.
    """
    fields.refuse_unsupported(UNSUPPORTED_SAMPLING)
    values: dict[str, Any] = dict(defaults)
    values |= {name: value for name in _FLOATS if (value := fields.optional(name, float)) is not None}
    values |= {name: value for name in ("top_k", "seed") if (value := fields.optional(name, int)) is not None}
    if "ignore_eos" in fields.values:
        values["ignore_eos"] = fields.required("ignore_eos", bool)
    if "stop" in fields.values:
        values["stop"] = _stops(fields)
    values["stop_token_ids"] = tuple(fields.get("stop_token_ids", list, []))
    try:
        values["max_tokens"] = _max_tokens(fields, max_tokens)
        return SamplingParams(**values, logprobs=logprobs)
    except SamplingError as error:
        raise from_engine(error, "") from None


def read_deadline(fields: Fields) -> float | None:
    """Seconds that the whole request may take, None for no limit."""
    seconds = fields.optional("deadline_s", float)
    if seconds is not None and not 0 < seconds < float("inf"):
        raise bad_field("deadline_s", f"deadline_s is {shown(seconds)}: give seconds above 0", "invalid_value")
    return seconds


def _max_tokens(fields: Fields, default: int) -> int:
    """The limit under the name that the request has for it, the newer one first."""
    name = next((name for name in ("max_completion_tokens", "max_tokens") if name in fields.values), None)
    if name is None:
        return default
    limit = fields.required(name, int)
    check_max_tokens(limit, name)
    return limit


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.values.get("stop", [])
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(text, str) and text for text in stops):
        raise bad_field("stop", "stop holds no text: give a string, or a list of strings that are not empty")
    if len(stops) > MOST_STOPS:
        raise bad_field("stop", f"stop has {len(stops)} strings: give {MOST_STOPS} at most", "array_above_max_length")
    return tuple(stops)
