"""Several choices, and several prompts, in one request to `starling serve`, asked for with the real OpenAI client."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from http_server import MODEL, Server, serving, wait_until

PROMPTS = ["Once upon a time", "The sky is", "A cat"]
MESSAGES: list[Any] = [{"role": "user", "content": "Say something."}]
DRAWN: dict[str, Any] = {"model": MODEL, "max_tokens": 12, "temperature": 1}


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[Server]:
    """Fewer rows than the requests have generations."""
    with serving(tiny_bundle, "--max-batch", "3", "--max-queue", "8", "--max-seq", "512") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client()


def test_choice_i_is_the_answer_of_seed_plus_i(client: openai.OpenAI) -> None:
    alone = [client.completions.create(prompt=PROMPTS[0], seed=5 + i, **DRAWN) for i in range(5)]
    together = client.completions.create(prompt=PROMPTS[0], seed=5, n=5, **DRAWN)
    assert [choice.index for choice in together.choices] == list(range(5))
    assert [choice.text for choice in together.choices] == [reply.choices[0].text for reply in alone]
    assert len({choice.text for choice in together.choices}) == 5
    usages = [reply.usage for reply in alone]
    assert together.usage is not None
    assert together.usage.prompt_tokens == usages[0].prompt_tokens  # type: ignore[union-attr]
    assert together.usage.completion_tokens == sum(one.completion_tokens for one in usages if one)
    assert together.usage.total_tokens == together.usage.prompt_tokens + together.usage.completion_tokens


def test_without_a_seed_choices_differ_and_greedy_ones_do_not(client: openai.OpenAI) -> None:
    drawn = client.chat.completions.create(messages=MESSAGES, n=3, **DRAWN)
    assert len({choice.message.content for choice in drawn.choices}) == 3
    greedy = client.chat.completions.create(messages=MESSAGES, n=3, **DRAWN | {"temperature": 0})
    assert len({choice.message.content for choice in greedy.choices}) == 1


def test_each_prompt_of_a_list_has_its_choices(client: openai.OpenAI, server: Server) -> None:
    alone = [client.completions.create(prompt=prompt, seed=3, n=2, logprobs=2, **DRAWN) for prompt in PROMPTS]
    reply = client.completions.create(prompt=PROMPTS, seed=3, n=2, logprobs=2, **DRAWN)
    assert [choice.index for choice in reply.choices] == list(range(6))
    expected = [choice for one in alone for choice in one.choices]
    assert [choice.text for choice in reply.choices] == [choice.text for choice in expected]
    assert [choice.logprobs for choice in reply.choices] == [choice.logprobs for choice in expected]
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone if one.usage)
    before = server.metric("vllm:request_prompt_tokens_count")
    ids = [[5, 6, 7], [8, 9]]
    both = client.completions.create(prompt=ids, **DRAWN | {"temperature": 0})
    assert [choice.text for choice in both.choices] == [
        client.completions.create(prompt=one, **DRAWN | {"temperature": 0}).choices[0].text for one in ids
    ]
    assert server.metric("vllm:request_prompt_tokens_count") == before + 4


def test_streams_have_every_choice_and_one_usage(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"prompt": PROMPTS[:2], "seed": 9, "n": 2, **DRAWN}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    texts, ends = [""] * 4, [0] * 4
    for chunk in chunks[:-1]:
        [choice] = chunk.choices
        texts[choice.index] += choice.text
        ends[choice.index] += choice.finish_reason is not None
    assert texts == [choice.text for choice in whole.choices]
    assert ends == [1] * 4
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)

    deltas = list(client.chat.completions.create(messages=MESSAGES, n=3, stream=True, **DRAWN))
    roles = [chunk.choices[0].index for chunk in deltas if chunk.choices[0].delta.role]
    assert sorted(roles) == [0, 1, 2]
    firsts = [next(chunk for chunk in deltas if chunk.choices[0].index == i).choices[0].delta.role for i in range(3)]
    assert firsts == ["assistant"] * 3


def test_best_of_takes_the_likeliest_by_their_mean_log_probability(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"prompt": PROMPTS[0], "seed": 1, **DRAWN}
    every = client.completions.create(**asked, n=6, logprobs=0)
    means: list[tuple[float, str]] = []
    for choice in every.choices:
        assert choice.logprobs is not None
        values = choice.logprobs.token_logprobs or []
        means.append((sum(value for value in values if value is not None) / len(values), choice.text))
    best = client.completions.create(**asked, n=2, best_of=6)
    assert [choice.text for choice in best.choices] == [text for _, text in sorted(means, reverse=True)[:2]]
    assert [choice.index for choice in best.choices] == [0, 1]
    assert all(choice.logprobs is None for choice in best.choices)
    assert best.usage == every.usage


def test_a_deadline_ends_the_request_and_all_its_generations(server: Server) -> None:
    long = {"model": MODEL, "prompt": PROMPTS, "n": 2, "max_tokens": 450, "ignore_eos": True, "deadline_s": 0.05}
    status, _, body = server.request("POST", "/v1/completions", long)
    assert (status, json.loads(body)["error"]["code"]) == (504, "deadline_exceeded")
    wait_until(lambda: server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting") == 0, 10)


def test_more_than_waits_is_refused_and_nothing_of_it_runs_on(server: Server) -> None:
    long = {"model": MODEL, "prompt": PROMPTS[0], "n": 4, "max_tokens": 400, "ignore_eos": True}
    with socket.create_connection(("127.0.0.1", server.port)) as first:
        content = json.dumps(long).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
        first.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
        wait_until(lambda: server.metric("vllm:num_requests_waiting") == 1, 10)
        status, _, body = server.request("POST", "/v1/completions", long | {"n": 9})
        assert (status, json.loads(body)["error"]["code"]) == (429, "queue_full")
        # The client that goes away takes its four generations with it; those of the refused request are gone too.
    wait_until(lambda: server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting") == 0, 10)


def test_an_ended_connection_ends_every_generation_of_a_stream(server: Server, client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL, prompt=PROMPTS[0], n=6, max_tokens=450, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert server.metric("vllm:num_requests_running") == 3
    stream.close()
    wait_until(lambda: server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting") == 0, 10)
