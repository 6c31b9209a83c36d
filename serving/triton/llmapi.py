"""The entry with the names of TensorRT-LLM's `llmapi` model: one request, one prompt, no batch axis.

Names, types and defaults are those of triton_backend/all_models/llmapi/tensorrt_llm in TensorRT-LLM. `stop` is not a
stop word: it cancels the requests that carry the same id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starling.engine.errors import SamplingError
from starling.engine.generation.sampling_params import SamplingParams
from starling.serving.triton.entry_inputs import Inputs, Tensor, Unsupported, check_names, text_array
from starling.serving.triton.entry_interface import Call, Outputs
from starling.serving.triton.socket_messages import Delta, Job, RequestError

STOP = "stop"
_ANY = (-1,)
_PREFIX = "sampling_param_"
#: `SamplingParams.max_tokens` of TensorRT-LLM.
_MAX_TOKENS = 32
_SUPPORTED = (
    Tensor("text_input", "STRING", _ANY, optional=False),
    Tensor("streaming", "BOOL"),
    Tensor(f"{_PREFIX}temperature", "FP32"),
    Tensor(f"{_PREFIX}top_k", "INT32"),
    Tensor(f"{_PREFIX}top_p", "FP32"),
    Tensor(f"{_PREFIX}frequency_penalty", "FP32"),
    Tensor(f"{_PREFIX}presence_penalty", "FP32"),
    Tensor(f"{_PREFIX}max_tokens", "INT32"),
    Tensor(f"{_PREFIX}stop", "STRING", _ANY),
    Tensor(f"{_PREFIX}seed", "UINT64"),
    Tensor(f"{_PREFIX}exclude_input_from_output", "BOOL"),
    Tensor(f"{_PREFIX}return_perf_metrics", "BOOL"),
    Tensor("return_finish_reason", "BOOL"),
    Tensor("return_cumulative_logprob", "BOOL"),
    Tensor(STOP, "BOOL"),
)
_UNSUPPORTED = (
    Unsupported(Tensor(f"{_PREFIX}best_of", "INT32"), (1,)),
    Unsupported(Tensor("return_stop_reason", "BOOL"), (False,)),
    Unsupported(Tensor("image_url", "STRING", _ANY), ("",)),
    Unsupported(Tensor("lora_id", "UINT64")),
    Unsupported(Tensor("lora_name", "STRING"), ("",)),
    Unsupported(Tensor("lora_path", "STRING"), ("",)),
    Unsupported(Tensor("lora_ckpt_source", "STRING"), ("", "hf", "nemo")),
)
_TIMES = ("arrival_time_ns", "first_scheduled_time_ns", "first_token_time_ns", "last_token_time_ns")


class LlmApiInterface:
    """How requests of this convention become jobs, and answers its outputs."""

    batched = False
    inputs = (*_SUPPORTED, *(one.tensor for one in _UNSUPPORTED))
    outputs = (
        Tensor("text_output", "STRING", _ANY),
        Tensor("finish_reason", "STRING", _ANY),
        Tensor("cumulative_logprob", "FP32", _ANY),
        *(Tensor(name, "INT64") for name in _TIMES),
        Tensor("acceptance_rate", "FP32"),
        Tensor("total_accepted_draft_tokens", "INT32"),
        Tensor("total_draft_tokens", "INT32"),
    )

    def cancels(self, inputs: Inputs) -> bool:
        """Whether the request cancels those of its id instead of asking for text."""
        return bool(inputs.one(STOP, False))

    def read(self, inputs: Inputs, parameters: Mapping[str, Any]) -> Call:
        """The call of a request. Raises RequestError or SamplingError, naming the field."""
        check_names(inputs, [tensor.name for tensor in self.inputs], parameters)
        for unsupported in _UNSUPPORTED:
            unsupported.check(inputs.all(unsupported.tensor.name))
        if "text_input" not in inputs:
            raise RequestError("text_input is missing: it is required")
        prompt = inputs.one("text_input")
        with_logprob = bool(inputs.one("return_cumulative_logprob", False))
        answer = _Answer(
            with_reason=bool(inputs.one("return_finish_reason", False)),
            with_logprob=with_logprob,
            with_times=bool(inputs.one(f"{_PREFIX}return_perf_metrics", False)),
        )
        shown = inputs.one(f"{_PREFIX}exclude_input_from_output", True) is False
        params = _sampling(inputs, with_logprob=with_logprob)
        stream = bool(inputs.one("streaming", False))
        return Call(Job(prompt, params), stream, answer, prefix=prompt if shown else "")


def _sampling(inputs: Inputs, *, with_logprob: bool) -> SamplingParams:
    temperature, top_k, top_p = (inputs.one(f"{_PREFIX}{name}") for name in ("temperature", "top_k", "top_p"))
    # As TensorRT-LLM's sampler has it: whatever would leave one token, and saying nothing at all.
    if (temperature is None and top_k is None and top_p is None) or top_k == 1 or top_p == 0:
        temperature, top_k, top_p = 0.0, None, None
    try:
        return SamplingParams(
            temperature=1.0 if temperature is None else temperature,
            top_k=top_k or 0,
            top_p=1.0 if top_p is None else top_p,
            frequency_penalty=inputs.one(f"{_PREFIX}frequency_penalty", 0.0),
            presence_penalty=inputs.one(f"{_PREFIX}presence_penalty", 0.0),
            seed=inputs.one(f"{_PREFIX}seed"),
            max_tokens=inputs.one(f"{_PREFIX}max_tokens", _MAX_TOKENS),
            stop=tuple(word for word in inputs.all(f"{_PREFIX}stop") if word),
            logprobs=0 if with_logprob else None,
        )
    except SamplingError as error:
        raise RequestError(f"{_PREFIX}{error}") from None  # the message begins with the setting's own name


class _Answer:
    """The outputs of one request: each response of a stream has the whole text so far, as in TensorRT-LLM."""

    def __init__(self, *, with_reason: bool, with_logprob: bool, with_times: bool) -> None:
        self._with_reason, self._with_logprob, self._with_times = with_reason, with_logprob, with_times
        self._text = ""
        self._sum = 0.0

    def outputs(self, deltas: Sequence[Delta]) -> Outputs:
        """Arrays by name."""
        [delta] = deltas
        self._text += delta.text
        self._sum += sum(one.logprob for one in delta.logprobs)
        found: dict[str, NDArray[Any]] = {"text_output": text_array(self._text, batched=False)}
        if self._with_reason:
            found["finish_reason"] = text_array(str(delta.finish_reason), batched=False)
        if self._with_logprob:
            found["cumulative_logprob"] = np.array([self._sum], np.float32)
        if self._with_times and delta.times is not None:
            times = delta.times
            begin = times.submitted_ns
            offsets = (0.0, times.queue_s, times.ttft_s, times.total_s)
            moments = zip(_TIMES, offsets, strict=True)
            found |= {name: np.array([begin + round(offset * 1e9)], np.int64) for name, offset in moments}
            drafted, accepted = times.drafted_tokens, times.accepted_tokens
            found["acceptance_rate"] = np.array([accepted / drafted if drafted else 0.0], np.float32)
            found["total_accepted_draft_tokens"] = np.array([accepted], np.int32)
            found["total_draft_tokens"] = np.array([drafted], np.int32)
        return found
