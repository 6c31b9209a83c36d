"""An engine's refusals reach a client by their fields and codes, and say what a client can do."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from starling.engine.engine import Engine
from starling.engine.errors import (
    BackendError,
    BundleError,
    ClosedError,
    PromptError,
    QueueFullError,
    SamplingError,
    StarlingError,
    UserError,
)
from starling.engine.generation.sampling_params import SamplingParams
from starling.engine.serving_loop import ServingLoop
from starling.serving.api.api_errors import ApiError, from_engine
from starling.serving.api.fields import Fields
from starling.serving.api.sampling_fields import read_sampling
from starling.serving.http.request_bodies import ApiRequest, Limits
from starling.serving.http.service import Service
from starling.serving.triton.engine_socket import refusal

MAX_SEQ = 16
REQUEST = ApiRequest("tiny", SamplingParams(max_tokens=2), False, False, None, prompts=([1, 2, 3],))


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Iterator[Engine]:
    with Engine(tiny_bundle, max_seq=MAX_SEQ) as opened:
        yield opened


def refused(engine: Engine, request: ApiRequest, **limits: Any) -> ApiError:
    """What the service says to a request."""
    with ServingLoop(engine) as loop:
        service = Service(engine, loop, Limits(("tiny",), **{"max_seq": MAX_SEQ, "max_prompt": MAX_SEQ, **limits}))
        with pytest.raises(ApiError) as caught:
            asyncio.run(service.start(lambda: request, "id"))
    return caught.value


@pytest.mark.parametrize(
    ("error", "status", "param", "code"),
    [
        (SamplingError("qux", field="top_k"), 400, "top_k", None),
        (PromptError("qux"), 400, "messages", None),
        (PromptError("qux", code="context_length_exceeded"), 400, "messages", "context_length_exceeded"),
        (PromptError("qux", field="template"), 400, "template", None),
        (UserError("qux", field="deadline_s"), 400, "deadline_s", None),
        (QueueFullError("qux"), 429, None, "queue_full"),
        (ClosedError("qux"), 503, None, "shutting_down"),
        (BundleError("qux"), 500, None, None),
        (BackendError("qux"), 500, None, None),
        (StarlingError("qux"), 500, None, None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_status_field_and_code_do_not_come_from_the_words(
    error: StarlingError, status: int, param: str | None, code: str | None
) -> None:
    said = from_engine(error, "messages")
    assert (said.status, said.param, said.code) == (status, param, code)
    assert said.message == "qux" or status == 503


def test_a_detail_is_in_the_message_but_not_in_the_log() -> None:
    said = from_engine(PromptError("refused", detail="my secret"), "prompt")
    assert (said.message, said.logged) == ("refused: my secret", "refused")
    assert str(PromptError("refused", detail="my secret")) == "refused: my secret"


def test_a_prompt_beyond_the_cache_tells_a_client_what_a_client_can_do(engine: Engine) -> None:
    long = replace(REQUEST, prompts=([1] * (MAX_SEQ + 4),))
    said = refused(engine, long)
    assert said.message == f"the prompt has {MAX_SEQ + 4} tokens, but this server takes {MAX_SEQ}: shorten it"
    assert (said.status, said.param, said.code) == (400, "prompt", "context_length_exceeded")
    assert refused(engine, long, max_prompt=8).message.endswith("this server takes 8: shorten it")
    with pytest.raises(PromptError) as caught:
        engine.prepare(long.prompts[0], long.params)
    assert "raise --max-seq" in str(caught.value)
    assert (caught.value.field, caught.value.code) == ("prompt", "context_length_exceeded")
    to_triton = f"the prompt has {MAX_SEQ + 4} tokens, but the KV cache holds {MAX_SEQ}: shorten it"
    assert (str(refusal(caught.value)), refusal(caught.value).kind) == (to_triton, "invalid")


@pytest.mark.parametrize("prompt", [[], [10**9], [-1]], ids=str)
def test_what_is_no_prompt_is_refused(engine: Engine, prompt: list[int]) -> None:
    said = refused(engine, replace(REQUEST, prompts=(prompt,)))
    assert (said.status, said.param, said.code) == (400, "prompt", None)


def test_a_full_queue_tells_a_client_to_try_again(engine: Engine) -> None:
    refused = Event()
    with ServingLoop(engine, queue_limit=0) as loop:
        loop.submit([1], SamplingParams(max_tokens=2), on_chunk=lambda _: refused.wait(60) and None)
        with pytest.raises(QueueFullError, match="larger queue_limit") as caught:
            loop.submit([1])
        refused.set()
    said = from_engine(caught.value, "prompt")
    assert said.message == "0 request(s) already wait beside the 1 that run: try again later"
    assert said.headers == {"Retry-After": "1"}
    assert (str(refusal(caught.value)), refusal(caught.value).kind) == (said.message, "unavailable")


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_limit_is_refused_under_the_name_that_the_request_has_for_it(name: str) -> None:
    with pytest.raises(ApiError) as caught:
        read_sampling(Fields({name: -1}), {}, max_tokens=4, logprobs=None)
    assert (caught.value.param, caught.value.message) == (name, f"{name} is -1: give a whole number, 0 or more")


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"temperature": -1}, "temperature"),
        ({"stop_token_ids": (1, -2)}, "stop_token_ids"),
        ({"stop": ("a", "")}, "stop"),
        ({"stop": "a"}, "stop"),
        ({"seed": -2}, "seed"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"max_tokens": -1}, "max_tokens"),
    ],
    ids=str,
)
def test_a_sampling_error_names_the_setting(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(SamplingError) as caught:
        SamplingParams(**settings)
    assert caught.value.field == field
    assert str(caught.value).startswith(field)
