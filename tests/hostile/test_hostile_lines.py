"""Lines of a batch and requests to Triton's entries are read or refused, never anything else."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hostile_json import SAMPLING, VALUES, body, messages

from starling.engine.errors import UserError
from starling.serving.api.api_errors import ApiError
from starling.serving.api.sampling_fields import SAMPLING_FIELDS
from starling.serving.batch.input_lines import Entry, EntryReader
from starling.serving.batch.result_lines import failure_record
from starling.serving.triton.entry_inputs import Inputs
from starling.serving.triton.socket_messages import LINE_LIMIT, Job, RequestError
from starling.serving.triton.tensorrt_llm import TensorRtLlmInterface
from starling.serving.triton.vllm import VllmInterface

DEFAULTS = {"temperature": 0.0, "max_tokens": 16}
READER = EntryReader(DEFAULTS, "salt", lambda line: None)
LONGEST_MESSAGE = 1000
VLLM = (*SAMPLING, "best_of", "length_penalty", "bad_words", "guided_decoding", "truncate_prompt_tokens")


def test_lines_of_a_batch(rounds: int) -> None:
    counts, longest = Counter[str](), 0
    for number in range(3000 * rounds):
        draw = random.Random(number)
        names = (*sorted(SAMPLING_FIELDS), *SAMPLING, "id", "custom_id", "url", "body")
        line = body(draw, _line(draw, number), draw.choice((names, ("temperature", "seed", "stop", "id", "top_k"))))
        try:
            entry = READER.parse(line, number)
        except ApiError as error:
            counts["refused"] += 1
            longest = max(longest, len(error.message))
            continue
        counts["read"] += 1
        # What is read can be written: its id is any text or number that the line had.
        assert isinstance(entry, Entry)
        json.dumps(failure_record(entry, "x")).encode()
    assert longest < LONGEST_MESSAGE
    print(f"\nlines of a batch: {sum(counts.values())} inputs, {dict(counts)}")
    assert counts["read"] > 60 * rounds
    assert counts["refused"] > 1000 * rounds


@pytest.mark.parametrize("batched", [False, True], ids=["vllm", "tensorrt-llm"])
def test_requests_to_tritons_entries(rounds: int, batched: bool) -> None:
    interface = TensorRtLlmInterface() if batched else VllmInterface()
    counts, longest = Counter[str](), 0
    for number in range(2000 * rounds):
        draw = random.Random(number)
        arrays = _arrays(draw, batched)
        parameters = {draw.choice(VLLM): _parsed(draw.choice(VALUES)) for _ in range(draw.choice((0, 0, 1)))}
        try:
            call = interface.read(Inputs(arrays, batched=batched), parameters)
        except (RequestError, UserError) as error:
            counts["refused"] += 1
            longest = max(longest, len(str(error)))
            continue
        counts["read"] += 1
        line = call.job.to_line()
        assert len(line) < LINE_LIMIT
        assert Job.from_line(line).params.max_tokens == call.job.params.max_tokens
    assert longest < LONGEST_MESSAGE
    print(f"\n{'tensorrt-llm' if batched else 'vllm'}: {sum(counts.values())} inputs, {dict(counts)}")
    assert counts["read"] > 50 * rounds
    assert counts["refused"] > 500 * rounds


def _line(draw: random.Random, number: int) -> dict[str, Any]:
    if draw.random() < 0.3:
        return {"id": number, "messages": messages(draw)}
    if draw.random() < 0.3:
        inner = {"model": "m", "prompt": "Hi", "max_tokens": 1} | {draw.choice(SAMPLING): _parsed(draw.choice(VALUES))}
        return {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": inner}
    return {"id": draw.choice((number, "a", "\ud800")), "prompt": "Hi"}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # digits without end
        return 10**400


def _arrays(draw: random.Random, batched: bool) -> dict[str, Any]:
    """The inputs of a request. Triton itself holds them to the types that the entry declares, and to nothing else."""
    tensors = (TensorRtLlmInterface() if batched else VllmInterface()).inputs
    good: dict[str, Any] = {"text_input": np.array([b"Hi"], object)}
    if batched:
        good["max_tokens"] = np.array([4], np.int32)
    else:
        settings = {draw.choice(VLLM): draw.choice(VALUES) for _ in range(draw.randint(0, 2))}
        text = "{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in settings.items()) + "}"
        good["sampling_parameters"] = np.array([draw.choice((text, text, text, draw.choice(VALUES))).encode()], object)
    for _ in range(draw.choice((0, 0, 1, 2))):
        tensor = draw.choice(tensors)
        good[tensor.name] = draw.choice(ODD[tensor.dtype])
    return {name: array[None] if batched and draw.random() < 0.97 else array for name, array in good.items()}


def _shapes(values: Sequence[Any], dtype: Any) -> list[Any]:
    """Each value alone, none, all of them, and none of them in no axis at all."""
    return [*(np.array([value], dtype) for value in values), np.array([], dtype), np.array(values, dtype)]


ODD = {
    "FP32": _shapes((np.nan, np.inf, -np.inf, -1, 0, 1e-38, 3e38, 0.5), np.float32),
    "FP16": _shapes((np.nan, 1), np.float16),
    "INT32": _shapes((-(2**31), -1, 0, 1, 2**31 - 1), np.int32),
    "UINT64": _shapes((0, 1, 2**64 - 1), np.uint64),
    "BOOL": _shapes((True, False), np.bool_),
    "STRING": [
        *_shapes((b"", b"x", b"\xff\xfe", b"\x00", b"a" * 5000, VALUES[-1].encode()), object),
        np.array([b"a"] * 5000, object),
    ],
}
