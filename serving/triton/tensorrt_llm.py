"""The entry with the names of TensorRT-LLM's ensemble.

Names, types and shapes are those of all_models/inflight_batcher_llm/ensemble/config.pbtxt in TensorRT-LLM's Triton
backend, those of its older versions (min_length, random_seed) beside the newer ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starling.engine.generation.sampling_params import SamplingParams
from starling.engine.text.grammar import GrammarSpec
from starling.serving.api.api_errors import ApiError
from starling.serving.api.grammar_fields import GUIDE_TYPES, guided_by_type
from starling.serving.triton.entry_inputs import Inputs, Tensor, Unsupported, check_names, text_array
from starling.serving.triton.entry_interface import Answer, Call, Outputs
from starling.serving.triton.socket_messages import Delta, Job, RequestError

_ANY = (-1,)
_GUIDE_TYPE, _GUIDE = "guided_decoding_guide_type", "guided_decoding_guide"
_SUPPORTED = (
    Tensor("text_input", "STRING", optional=False),
    Tensor("max_tokens", "INT32", optional=False),
    Tensor("stop_words", "STRING", _ANY),
    Tensor("end_id", "INT32"),
    Tensor("pad_id", "INT32"),
    Tensor("top_k", "INT32"),
    Tensor("top_p", "FP32"),
    Tensor("temperature", "FP32"),
    Tensor("repetition_penalty", "FP32"),
    Tensor("presence_penalty", "FP32"),
    Tensor("frequency_penalty", "FP32"),
    Tensor("min_tokens", "INT32"),
    Tensor("min_length", "INT32"),
    Tensor("bad_words", "STRING", _ANY),
    Tensor("random_seed", "UINT64"),
    Tensor("seed", "UINT64"),
    Tensor(_GUIDE_TYPE, "STRING"),
    Tensor(_GUIDE, "STRING"),
    Tensor("return_log_probs", "BOOL"),
    Tensor("return_num_input_tokens", "BOOL"),
    Tensor("return_num_output_tokens", "BOOL"),
    Tensor("exclude_input_in_output", "BOOL"),
    Tensor("stream", "BOOL"),
)
_UNSUPPORTED = (
    Unsupported(Tensor("beam_width", "INT32"), (1,)),
    Unsupported(Tensor("num_return_sequences", "INT32"), (1,)),
    Unsupported(Tensor("length_penalty", "FP32"), (1.0, 0.0)),
    Unsupported(Tensor("return_context_logits", "BOOL"), (False,)),
    Unsupported(Tensor("return_generation_logits", "BOOL"), (False,)),
    Unsupported(Tensor("return_perf_metrics", "BOOL"), (False,)),
    Unsupported(Tensor("decoder_text_input", "STRING"), ("",)),
    Unsupported(Tensor("embedding_bias_words", "STRING", _ANY), ("",)),
    Unsupported(Tensor("embedding_bias_weights", "FP32", _ANY), (0.0,)),
    Unsupported(Tensor("prompt_embedding_table", "FP16", (-1, -1))),
    Unsupported(Tensor("prompt_table_extra_id", "UINT64")),
    Unsupported(Tensor("prompt_vocab_size", "INT32"), (0,)),
    Unsupported(Tensor("lora_task_id", "UINT64")),
    Unsupported(Tensor("lora_weights", "FP16", (-1, -1))),
    Unsupported(Tensor("lora_config", "INT32", (-1, 3))),
)


class TensorRtLlmInterface:
    """How requests of this convention become jobs, and answers its outputs."""

    batched = True
    inputs = (*_SUPPORTED, *(one.tensor for one in _UNSUPPORTED))
    outputs = (
        Tensor("text_output", "STRING", _ANY),
        Tensor("cum_log_probs", "FP32", _ANY),
        Tensor("output_log_probs", "FP32", (-1, -1)),
        Tensor("num_input_tokens", "INT32"),
        Tensor("num_output_tokens", "INT32"),
    )

    def cancels(self, inputs: Inputs) -> bool:
        """Never: a client cancels its own request."""
        return False

    def read(self, inputs: Inputs, parameters: Mapping[str, Any]) -> Call:
        """The call of a request. Raises RequestError or SamplingError, naming the field."""
        check_names(inputs, [tensor.name for tensor in self.inputs], parameters)
        for unsupported in _UNSUPPORTED:
            unsupported.check(inputs.all(unsupported.tensor.name))
        for name in ("text_input", "max_tokens"):
            if name not in inputs:
                raise RequestError(f"{name} is missing: it is required")
        prompt = inputs.one("text_input")
        stream = bool(inputs.one("stream", False))
        shown = not stream and not inputs.one("exclude_input_in_output", False)
        return Call(Job(prompt, _sampling(inputs)), stream, _answer(inputs), prefix=prompt if shown else "")


def _sampling(inputs: Inputs) -> SamplingParams:
    temperature, top_k, top_p = _draw(inputs)
    end_id = inputs.one("end_id")
    return SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=inputs.one("repetition_penalty", 1.0),
        presence_penalty=inputs.one("presence_penalty", 0.0),
        frequency_penalty=inputs.one("frequency_penalty", 0.0),
        bad_words=tuple(word for word in inputs.all("bad_words") if word),
        seed=_either(inputs, "seed", "random_seed"),
        min_tokens=_either(inputs, "min_tokens", "min_length") or 0,
        max_tokens=inputs.one("max_tokens"),
        stop=tuple(word for word in inputs.all("stop_words") if word),
        # As in TensorRT-LLM, end_id replaces the model's own end tokens, and -1 leaves none.
        stop_token_ids=() if end_id in (None, -1) else (end_id,),
        ignore_eos=end_id is not None,
        logprobs=0 if inputs.one("return_log_probs", False) else None,
        grammar=_grammar(inputs.one(_GUIDE_TYPE) or "", inputs.one(_GUIDE) or ""),
    )


def _grammar(kind: str, guide: str) -> GrammarSpec | None:
    if not kind:
        if guide:
            raise RequestError(f"{_GUIDE} is given without {_GUIDE_TYPE}: give both")
        return None
    try:
        return guided_by_type(kind, guide, _GUIDE if kind in GUIDE_TYPES else _GUIDE_TYPE)
    except ApiError as error:
        raise RequestError(error.message) from None


def _draw(inputs: Inputs) -> tuple[float, int, float]:
    """temperature, top_k, top_p. As in TensorRT-LLM the likeliest token is taken where neither top_k nor top_p is set.

    top_k 1 is greedy, and so is top_p 0 with top_k 0 or absent; top_k 0 leaves the choice to top_p.
    """
    top_k, top_p = inputs.one("top_k"), inputs.one("top_p")
    temperature = inputs.one("temperature", 1.0)
    if (top_k is None and top_p is None) or top_k == 1 or (not top_k and top_p == 0):
        return (0.0 if temperature >= 0 else temperature), 0, 1.0
    return temperature, top_k or 0, 1.0 if top_p is None else top_p


def _either(inputs: Inputs, name: str, older: str) -> int | None:
    """A setting by its name or the one that it had in older versions."""
    given = {each: inputs.one(each) for each in (name, older) if each in inputs}
    if len(set(given.values())) > 1:
        raise RequestError(f"{name} is {given[name]} and {older} {given[older]}: give one of them")
    return next(iter(given.values()), None)


def _answer(inputs: Inputs) -> Answer:
    wanted = {
        name
        for name, flag in (
            ("cum_log_probs", "return_log_probs"),
            ("output_log_probs", "return_log_probs"),
            ("num_input_tokens", "return_num_input_tokens"),
            ("num_output_tokens", "return_num_output_tokens"),
        )
        if inputs.one(flag, False)
    }
    return _Answer(wanted)


class _Answer:
    """The outputs of one request; log-probabilities are summed over the whole answer, tokens counted likewise."""

    def __init__(self, wanted: set[str]) -> None:
        self._wanted = wanted
        self._sum, self._tokens = 0.0, 0

    def outputs(self, deltas: Sequence[Delta]) -> Outputs:
        """Arrays by name, with the batch axis."""
        [delta] = deltas
        values = [one.logprob for one in delta.logprobs]
        self._sum += sum(values)
        self._tokens += delta.tokens
        found: dict[str, NDArray[Any]] = {
            "cum_log_probs": np.array([[self._sum]], np.float32),
            "output_log_probs": np.array([[values]], np.float32),
            "num_output_tokens": np.array([[self._tokens]], np.int32),
        }
        if delta.finish_reason is not None:
            found["num_input_tokens"] = np.array([[delta.prompt_tokens]], np.int32)
        wanted = {name: array for name, array in found.items() if name in self._wanted}
        return {"text_output": text_array(delta.text, batched=True), **wanted}
