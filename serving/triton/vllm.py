"""The entry with the names of Triton's vLLM backend (src/model.py there): one request, one prompt, no batch axis."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starling.engine.errors import SamplingError, one_line, shown
from starling.engine.generation.sampling_params import SamplingParams
from starling.engine.text.grammar import GrammarSpec
from starling.serving.api.api_errors import ApiError
from starling.serving.api.fields import Fields
from starling.serving.api.grammar_fields import VLLM_FIELDS, read_grammar
from starling.serving.api.sampling_fields import MOST_LOGPROBS, read_cache_salt, read_choices
from starling.serving.api.token_texts import RankedTable, ranked_table
from starling.serving.triton.entry_inputs import Inputs, Tensor, Unsupported, check_names, refuse_chats
from starling.serving.triton.entry_interface import Call, Outputs
from starling.serving.triton.socket_messages import Delta, Job, Logprob, RequestError

_SETTINGS = "sampling_parameters"
#: Output by the flag that asks for it.
_FLAGS = {
    "return_finish_reason": "finish_reason",
    "return_cumulative_logprob": "cumulative_logprob",
    "return_logprobs": "logprobs",
    "return_num_input_tokens": "num_input_tokens",
    "return_num_output_tokens": "num_output_tokens",
}
_IMAGE = Unsupported(Tensor("image", "STRING", (-1,)), ("",))
#: vLLM's defaults where they differ from the engine's.
_DEFAULTS: dict[str, Any] = {"temperature": 1.0, "max_tokens": 16}
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_COUNTS = ("top_k", "seed", "max_tokens", "min_tokens", "logprobs")
_OTHERS = ("stop_token_ids", "ignore_eos", "logit_bias", "bad_words")
#: Settings of vLLM that this engine lacks, with the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1, None),
    "length_penalty": (1.0,),
    "early_stopping": (False,),
    "use_beam_search": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "detokenize": (True,),
    "prompt_logprobs": (None,),
    "truncate_prompt_tokens": (None,),
}


class VllmInterface:
    """How requests of this convention become jobs, and answers its outputs."""

    batched = False
    inputs = (
        Tensor("text_input", "STRING", optional=False),
        _IMAGE.tensor,
        Tensor("stream", "BOOL"),
        Tensor(_SETTINGS, "STRING"),
        Tensor("exclude_input_in_output", "BOOL"),
        *(Tensor(flag, "BOOL") for flag in _FLAGS),
    )
    outputs = (
        Tensor("text_output", "STRING", (-1,)),
        Tensor("finish_reason", "STRING", (-1,)),
        Tensor("cumulative_logprob", "FP32", (-1,)),
        Tensor("logprobs", "STRING", (-1,)),
        Tensor("num_input_tokens", "UINT32"),
        Tensor("num_output_tokens", "UINT32", (-1,)),
    )

    def cancels(self, inputs: Inputs) -> bool:
        """Never: a client cancels its own request."""
        return False

    def read(self, inputs: Inputs, parameters: Mapping[str, Any]) -> Call:
        """The call of a request. Request parameters are sampling settings where sampling_parameters is absent.

        Raises RequestError or SamplingError, naming the field.
        """
        known = [tensor.name for tensor in self.inputs]
        check_names(inputs, known, {} if _SETTINGS not in inputs else parameters)
        _IMAGE.check(inputs.all("image"))
        if "text_input" not in inputs:
            raise RequestError("text_input is missing: it is required")
        prompt = inputs.one("text_input")
        stream = bool(inputs.one("stream", False))
        exclude = inputs.one("exclude_input_in_output")
        if stream and exclude is False:
            raise RequestError("exclude_input_in_output is False: a stream never repeats the input; give True")
        wanted = {output for flag, output in _FLAGS.items() if inputs.one(flag, False)}
        settings = _settings(inputs.one(_SETTINGS)) if _SETTINGS in inputs else dict(parameters)
        refuse_chats(settings)
        choices, salt = _of_the_prompt(settings)
        params = _sampling(settings, with_logprobs=bool({"logprobs", "cumulative_logprob"} & wanted))
        answer = _Answer(wanted, choices)
        return Call(Job(prompt, params, choices, salt), stream, answer, prefix="" if stream or exclude else prompt)


def _settings(text: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except json.JSONDecodeError as error:
        raise RequestError(f"{_SETTINGS} is not JSON: {error.msg} at character {error.pos}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{_SETTINGS} cannot be read: {one_line(error)}") from None
    if not isinstance(settings, dict):
        raise RequestError(f"{_SETTINGS} is {type(settings).__name__}: give a JSON object")
    return settings


def _of_the_prompt(settings: dict[str, Any]) -> tuple[int, str]:
    """How many answers it gets, and the salt of its known prefixes; both are taken out of the settings."""
    given = {name: _unquoted(settings.pop(name)) for name in ("n",) if name in settings}
    given |= {name: settings.pop(name) for name in ("cache_salt",) if name in settings}
    try:
        return read_choices(Fields(given)), read_cache_salt(Fields(given))
    except ApiError as error:
        raise RequestError(f"{_SETTINGS}: {error.message}") from None


def _sampling(settings: dict[str, Any], *, with_logprobs: bool) -> SamplingParams:
    grammar = _grammar({name: settings.pop(name) for name in VLLM_FIELDS if name in settings})
    for name, neutral in _NEUTRAL.items():
        if name in settings and _unquoted(settings.pop(name)) not in neutral:
            raise RequestError(f"{_SETTINGS}: {name} is not supported: leave it out or give {json.dumps(neutral[0])}")
    values = {**_DEFAULTS, **{name: _unquoted(value) for name, value in settings.items() if name != "stop"}}
    for name in values:
        if name not in (*_NUMBERS, *_COUNTS, *_OTHERS):
            raise RequestError(f"{_SETTINGS}: {name} is no setting that this model knows")
    stop = settings.get("stop") or []
    values["stop"] = _tuple("stop", [stop] if isinstance(stop, str) else stop, "a string or a list of strings")
    values["bad_words"] = _tuple("bad_words", settings.get("bad_words") or [], "a list of strings")
    values["logit_bias"] = _biases(values.get("logit_bias") or {})
    values["stop_token_ids"] = _tuple("stop_token_ids", values.get("stop_token_ids") or [], "a list of token ids")
    most = values.get("logprobs")
    if isinstance(most, int) and most > MOST_LOGPROBS:
        raise RequestError(f"{_SETTINGS}: logprobs is {shown(most)}: give at most {MOST_LOGPROBS}")
    if with_logprobs and values.get("logprobs") is None:
        values["logprobs"] = 0
    try:
        return SamplingParams(**values, grammar=grammar)
    except SamplingError as error:
        raise RequestError(f"{_SETTINGS}: {error}") from None


def _grammar(fields: dict[str, Any]) -> GrammarSpec | None:
    try:
        return read_grammar(Fields(fields))
    except ApiError as error:
        raise RequestError(f"{_SETTINGS}: {error.message}") from None


def _tuple(name: str, value: Any, wanted: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise RequestError(f"{_SETTINGS}: {name} is {shown(value)}: give {wanted}")
    return tuple(value)


def _biases(value: Any) -> dict[int, Any]:
    """Biases by token id; JSON's keys are strings."""
    try:
        return {int(token): bias for token, bias in value.items()}
    except (AttributeError, ValueError):
        raise RequestError(
            f"{_SETTINGS}: logit_bias is {shown(value)}: give an object with token ids as keys"
        ) from None


def _unquoted(value: Any) -> Any:
    """A number or truth value that a client wrote as a string, as it does in vLLM's own samples."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value.lower())
    except (ValueError, RecursionError):
        return value


class _Answer:
    """The outputs of one request, a value for each answer; token counts are those of each response, as vLLM's."""

    def __init__(self, wanted: set[str], choices: int) -> None:
        self._wanted = wanted
        self._sums = np.zeros(choices)

    def outputs(self, deltas: Sequence[Delta]) -> Outputs:
        """Arrays by name."""
        self._sums += [sum(one.logprob for one in delta.logprobs) for delta in deltas]
        found: dict[str, NDArray[Any]] = {
            "finish_reason": _texts(str(delta.finish_reason) for delta in deltas),
            "cumulative_logprob": self._sums.astype(np.float32),
            "logprobs": _texts(json.dumps([_table(one) for one in delta.logprobs]) for delta in deltas),
            "num_output_tokens": np.array([delta.tokens for delta in deltas], np.uint32),
        }
        if prompt_tokens := max(delta.prompt_tokens for delta in deltas):  # known once an answer has ended
            found["num_input_tokens"] = np.array([prompt_tokens], np.uint32)
        wanted = {name: array for name, array in found.items() if name in self._wanted}
        return {"text_output": _texts(delta.text for delta in deltas), **wanted}


def _texts(texts: Iterable[str]) -> NDArray[Any]:
    return np.array([text.encode() for text in texts], dtype=object)


def _table(chosen: Logprob) -> RankedTable:
    return ranked_table((chosen.token, chosen.logprob, chosen.text), chosen.top)
