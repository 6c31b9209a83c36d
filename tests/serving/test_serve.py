"""`starling serve` answers the real OpenAI client as OpenAI's API does."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from http_server import MODEL, Server, serving

from starling.engine import Engine

PROMPT = "Once upon a time"
MESSAGES: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello, schöne Welt 😀"}]


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[Server]:
    with serving(tiny_bundle, "--max-batch", "4", "--max-seq", "512", "--max-prompt", "300") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client()


def test_models_health_and_readiness(server: Server, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "starling"
    for path in ("/health", "/ready", "/metrics"):
        assert server.request("GET", path)[0] == 200


def test_a_greedy_completion_is_the_engines_own(client: openai.OpenAI, tiny_bundle: Path) -> None:
    reply = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=24, temperature=0)
    with Engine(tiny_bundle, max_seq=512, threads=2) as engine:
        expected = engine.generate(PROMPT, max_tokens=24)
    assert reply.choices[0].text == expected.text
    assert reply.choices[0].finish_reason == expected.finish_reason == "length"
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(expected.prompt_tokens), 24)


def test_token_ids_are_a_prompt(client: openai.OpenAI, tiny_bundle: Path) -> None:
    with Engine(tiny_bundle, max_seq=64) as engine:
        ids = engine.tokenizer.encode(PROMPT)
    texts = [
        client.completions.create(model=MODEL, prompt=prompt, max_tokens=8, temperature=0).choices[0].text
        for prompt in (PROMPT, ids, [ids])
    ]
    assert texts[0] == texts[1] == texts[2]


def test_a_chat_is_the_engines_own_and_developer_means_system(client: openai.OpenAI, tiny_bundle: Path) -> None:
    with Engine(tiny_bundle, max_seq=512, threads=2) as engine:
        ids = engine.apply_chat_template(MESSAGES)
        expected = engine.generate(ids, reply=True, max_tokens=24)
    parts = [{"type": "text", "text": "Hello, schöne "}, {"type": "text", "text": "Welt 😀"}]
    newer: list[Any] = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    for messages in (MESSAGES, newer):
        reply = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=24, temperature=0)
        assert reply.choices[0].message.content == expected.text
        assert reply.choices[0].message.role == "assistant"
        assert reply.usage is not None
        assert reply.usage.prompt_tokens == len(ids)


def test_streams_give_the_whole_answer_in_pieces_and_end_with_the_usage(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"model": MODEL, "max_tokens": 64, "temperature": 1, "seed": 11}
    whole = client.completions.create(prompt=PROMPT, **settings)
    chunks = list(
        client.completions.create(prompt=PROMPT, **settings, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert len(chunks) > 10
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)

    chat = client.chat.completions.create(messages=MESSAGES, **settings)
    deltas = list(client.chat.completions.create(messages=MESSAGES, **settings, stream=True))
    assert deltas[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in deltas) == chat.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in deltas][-2:] == [None, "length"]
    assert all(chunk.usage is None for chunk in deltas)


def test_a_stream_is_events_of_whole_utf8_characters_and_ends_with_done(server: Server) -> None:
    body = {"model": MODEL, "prompt": "\U0001f600 ü", "max_tokens": 200, "temperature": 1, "seed": 3, "stream": True}
    status, headers, content = server.request("POST", "/v1/completions", body)
    assert status == 200
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    events = content.split(b"\n\n")
    assert events[-2:] == [b"data: [DONE]", b""]
    texts = [json.loads(event.decode().removeprefix("data: "))["choices"][0]["text"] for event in events[:-2]]
    whole = json.loads(server.request("POST", "/v1/completions", body | {"stream": False})[2])
    assert "".join(texts) == whole["choices"][0]["text"]
    assert not "".join(texts).isascii()


@pytest.mark.parametrize("as_list", [False, True])
def test_stop_strings_end_the_text_before_them(client: openai.OpenAI, as_list: bool) -> None:
    settings: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 32, "temperature": 0}
    text = client.completions.create(**settings).choices[0].text
    stop = text[len(text) // 2 :][:6]
    given = ["never in there", stop] if as_list else stop
    stopped = client.completions.create(**settings, stop=given)
    assert stopped.choices[0].text == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    streamed = client.completions.create(**settings, stop=given, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == stopped.choices[0].text


def test_a_seed_repeats_the_answer(client: openai.OpenAI) -> None:
    def text(seed: int) -> str:
        reply = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=16, temperature=1, seed=seed)
        return reply.choices[0].text

    assert text(7) == text(7) != text(8)


def test_the_default_is_to_draw_as_openais_api_does(client: openai.OpenAI) -> None:
    texts = {client.completions.create(model=MODEL, prompt=PROMPT).choices[0].text for _ in range(3)}
    assert len(texts) > 1


def test_logprobs_of_a_completion(client: openai.OpenAI) -> None:
    reply = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=8, temperature=0, logprobs=3)
    logprobs, text = reply.choices[0].logprobs, reply.choices[0].text
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.top_logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.text_offset is not None
    assert "".join(logprobs.tokens) == text
    assert [
        text[offset:].startswith(token) for offset, token in zip(logprobs.text_offset, logprobs.tokens, strict=True)
    ]
    for token, value, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert value == max(top.values()) == top[token] < 0  # greedy takes the likeliest


def test_logprobs_of_a_chat_streamed_and_whole(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**settings, logprobs=True, top_logprobs=2).choices[0]
    assert whole.logprobs is not None
    assert whole.logprobs.content is not None
    assert len(whole.logprobs.content) == 8
    assert "".join(entry.token for entry in whole.logprobs.content).strip() == (whole.message.content or "").strip()
    for entry in whole.logprobs.content:
        assert entry.bytes == list(entry.token.encode())
        assert next(top.logprob for top in entry.top_logprobs) == entry.logprob
        assert len(entry.top_logprobs) == 2
    streamed = client.chat.completions.create(**settings, logprobs=True, top_logprobs=2, stream=True)
    pieces = [chunk.choices[0].logprobs for chunk in streamed]
    assert [entry for piece in pieces if piece for entry in piece.content or ()] == whole.logprobs.content


def test_concurrent_requests_do_not_change_each_other(client: openai.OpenAI) -> None:
    prompts = [f"{PROMPT}, number {index}, " + "there was " * (index % 4) for index in range(12)]

    def answer(prompt: str) -> str:
        return client.completions.create(model=MODEL, prompt=prompt, max_tokens=16, temperature=0).choices[0].text

    alone = [answer(prompt) for prompt in prompts]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(answer, prompts))
    assert together == alone


def test_the_metrics_count_what_was_done(server: Server, client: openai.OpenAI) -> None:
    def counts() -> list[float]:
        return [
            server.metric("vllm:prompt_tokens_total"),
            server.metric("vllm:generation_tokens_total"),
            server.metric("vllm:request_success_total", finished_reason="length"),
            server.metric("vllm:time_to_first_token_seconds_count"),
            server.metric("vllm:inter_token_latency_seconds_count"),
            server.metric("vllm:e2e_request_latency_seconds_count"),
        ]

    before = counts()
    usage = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=5, temperature=0).usage
    assert usage is not None
    added = [after - earlier for after, earlier in zip(counts(), before, strict=True)]
    assert added == [usage.prompt_tokens, 5, 1, 1, 4, 1]
    assert server.metric("vllm:num_requests_running") == server.metric("vllm:num_requests_waiting") == 0


def test_a_real_models_chat_in_utf8(demo_bundle: Path) -> None:
    with serving(demo_bundle, "--max-batch", "2", "--max-seq", "256") as real:
        reply = real.client().chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            temperature=0,
            max_tokens=32,
        )
    assert "Paris" in (reply.choices[0].message.content or "")
    assert reply.choices[0].finish_reason == "stop"
