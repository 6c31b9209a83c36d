"""The sampling part of a request: OpenAI's fields, and the engine's own as extensions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from starling.engine.errors import SamplingError, shown
from starling.engine.generation.sampling_params import MOST_STOP_STRINGS, SamplingParams, check_max_tokens
from starling.serving.api.api_errors import bad_field, from_engine
from starling.serving.api.fields import Fields, Unsupported
from starling.serving.api.grammar_fields import GRAMMAR_FIELDS, read_grammar

MOST_LOGPROBS = 20
#: OpenAI's own limit on `n`.
MOST_CHOICES = 128
#: Characters of a cache_salt.
LONGEST_SALT = 256

#: Fields of vLLM and SGLang that would change the answer, with what changes nothing.
_OTHER_SERVERS: dict[str, tuple[object, ...]] = {
    "allowed_token_ids": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "no_repeat_ngram_size": (0,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
UNSUPPORTED_SAMPLING: Unsupported = {name: (neutral, "it is not supported") for name, neutral in _OTHER_SERVERS.items()}
SAMPLING_FIELDS = frozenset(
    {
        *("max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop"),
        *("presence_penalty", "frequency_penalty", "logit_bias", "min_tokens", "bad_words"),
        *("top_k", "min_p", "repetition_penalty", "ignore_eos", "stop_token_ids", "deadline_s"),
        *GRAMMAR_FIELDS,
        *UNSUPPORTED_SAMPLING,
    }
)
#: Fields that say nothing about the answer.
IGNORED_FIELDS = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}) | {
    "prompt_cache_options",
    "prompt_cache_retention",
}

_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
#: A token id as a JSON key.
_TOKEN_ID = re.compile("[0-9]{1,9}")
_COUNTS = ("top_k", "seed", "min_tokens")


def read_sampling(
    fields: Fields, defaults: Mapping[str, Any], *, max_tokens: int, logprobs: int | None
) -> SamplingParams:
    """SamplingParams of a request. `defaults` are the values of fields left out, `max_tokens` of that one.

    Raises ApiError that names the field for a bad value, and for what is not supported.
    """
    fields.refuse_unsupported(UNSUPPORTED_SAMPLING)
    values: dict[str, Any] = dict(defaults)
    values |= {name: value for name in _FLOATS if (value := fields.optional(name, float)) is not None}
    values |= {name: value for name in _COUNTS if (value := fields.optional(name, int)) is not None}
    if "ignore_eos" in fields.values:
        values["ignore_eos"] = fields.required("ignore_eos", bool)
    if "stop" in fields.values:
        values["stop"] = _stops(fields)
    if "logit_bias" in fields.values:
        values["logit_bias"] = _logit_bias(fields)
    if "bad_words" in fields.values:
        values["bad_words"] = fields.required("bad_words", list)
    values["stop_token_ids"] = tuple(fields.get("stop_token_ids", list, []))
    values["grammar"] = read_grammar(fields)
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


def read_choices(fields: Fields, name: str = "n", default: int = 1) -> int:
    """How many answers a prompt gets. Raises ApiError."""
    count = fields.get(name, int, default)
    if not 1 <= count <= MOST_CHOICES:
        raise bad_field(name, f"{name} is {shown(count)}: give 1 to {MOST_CHOICES}", "invalid_value")
    return count


def read_cache_salt(fields: Fields) -> str:
    """What keeps a request's known prefixes to those of the same salt; "" for none. Raises ApiError."""
    salt = fields.get("cache_salt", str, "")
    if len(salt) > LONGEST_SALT:
        problem = f"cache_salt has {len(salt)} characters: give at most {LONGEST_SALT}"
        raise bad_field("cache_salt", problem, "invalid_value")
    return salt


def _max_tokens(fields: Fields, default: int) -> int:
    """The limit under the name that the request has for it, the newer one first."""
    name = next((name for name in ("max_completion_tokens", "max_tokens") if name in fields.values), None)
    if name is None:
        return default
    limit = fields.required(name, int)
    check_max_tokens(limit, name)
    return limit


def _logit_bias(fields: Fields) -> dict[int, Any]:
    """Biases by token id; JSON's keys are strings."""
    biases = fields.required("logit_bias", dict)
    for key in biases:
        if not _TOKEN_ID.fullmatch(key):
            raise bad_field("logit_bias", f"logit_bias has the key {shown(key)}: give token ids as keys")
    return {int(key): value for key, value in biases.items()}


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.values.get("stop", [])
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(text, str) and text for text in stops):
        raise bad_field("stop", "stop holds no text: give a string, or a list of strings that are not empty")
    if len(stops) > MOST_STOP_STRINGS:
        problem = f"stop has {len(stops)} strings: give {MOST_STOP_STRINGS} at most"
        raise bad_field("stop", problem, "array_above_max_length")
    return tuple(stops)
