"""What evaluation harnesses ask a server for: a prompt's log-probabilities (echo), and its tokenizer."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from http_server import MODEL, Server, serving
from scores_over_http import CHAT, TEXT, complete, post, pytorch
from starlette.testclient import TestClient

from starling.engine.engine import Engine
from starling.engine.serving_loop import ServingLoop
from starling.engine.text.detokenizer import REPLACEMENT
from starling.engine.text.tokenizer import Tokenizer
from starling.export.check.torch_reference import load_reference
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.serving.http.app import make_app
from starling.serving.http.request_bodies import API_DEFAULTS, Limits
from starling.serving.http.served import Served
from starling.serving.http.service import Service

SPACE = "▁"


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[Server]:
    with serving(tiny_bundle, "--max-batch", "3", "--max-seq", "512") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client()


@pytest.fixture(scope="module")
def tokenizer(tiny_bundle: Path) -> Tokenizer:
    return Tokenizer.load(tiny_bundle, 32002)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Checkpoint) -> torch.nn.Module:
    return load_reference(tiny_checkpoint.config, tiny_checkpoint.tensors)


def test_a_text_is_scored_without_an_answer(
    client: openai.OpenAI, tokenizer: Tokenizer, model: torch.nn.Module
) -> None:
    ids = tokenizer.encode(TEXT)
    expected = pytorch(model, ids)
    reply = client.completions.create(model=MODEL, prompt=TEXT, max_tokens=0, echo=True, logprobs=2, temperature=0)
    [choice] = reply.choices
    assert (choice.text, choice.finish_reason) == (TEXT, "length")
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(ids), 0)
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert logprobs.token_logprobs[0] is logprobs.top_logprobs[0] is None
    wanted = [expected[i - 1][ids[i]] for i in range(1, len(ids))]
    assert logprobs.token_logprobs[1:] == pytest.approx(wanted, abs=1e-4)
    for value, top in zip(logprobs.token_logprobs[1:], logprobs.top_logprobs[1:], strict=True):
        assert value in top.values(), "the same number in both places"
        assert len(top) in (2, 3)


def test_offsets_are_where_each_token_stands_in_the_text(server: Server, tokenizer: Tokenizer) -> None:
    for prompt in (TEXT, tokenizer.encode(TEXT)):
        choice = complete(server, prompt=prompt, max_tokens=6, echo=True, logprobs=0)["choices"][0]
        text, logprobs = choice["text"], choice["logprobs"]
        assert text.startswith(TEXT)
        offsets, tokens = logprobs["text_offset"], logprobs["tokens"]
        assert offsets == sorted(offsets)
        assert (offsets[0], offsets[-1] < len(text)) == (0, True)
        whole = [(at, token) for at, token in zip(offsets, tokens, strict=True) if REPLACEMENT not in token]
        assert len(whole) > 15
        for at, token in whole[1:]:
            # The first word's token has a space that the text does not begin with.
            assert text[at:].startswith(token) or (at == 0 and text.startswith(token.lstrip()))
        assert offsets.count(text.index("𓀀")) == 4, "four tokens are one character's bytes"


def test_lm_evals_own_request(server: Server, tokenizer: Tokenizer, model: torch.nn.Module) -> None:
    """As lm-eval 0.4.13 sends it, and as it reads the answer: by index, without the generated token."""
    contexts = [tokenizer.encode(text) for text in ("The largest city", "Once upon a time there was", "A")]
    prompts = [[*contexts[0], 420, 6316], [*contexts[1]], [*contexts[2], 28781]]
    for _ in range(2):  # the second continues as greedy decoding does
        prompts[1].append(int(pytorch(model, prompts[1])[-1].argmax()))
    body = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True, "prompt": prompts}
    choices = sorted(complete(server, **body)["choices"], key=lambda choice: choice["index"])
    assert len(choices) == 3
    for ids, context, choice in zip(prompts, contexts, choices, strict=True):
        expected = pytorch(model, ids)
        values = choice["logprobs"]["token_logprobs"]
        tops = choice["logprobs"]["top_logprobs"]
        assert len(values) == len(tops) == len(ids) + 1
        at = len(context)
        assert values[at:-1] == pytest.approx([expected[i - 1][ids[i]] for i in range(at, len(ids))], abs=1e-4)
        is_greedy = all(value == max(top.values()) for value, top in zip(values[at:-1], tops[at:-1], strict=True))
        assert is_greedy is all(int(expected[i - 1].argmax()) == ids[i] for i in range(at, len(ids)))
    assert [sorted(choice["logprobs"]) for choice in choices] == [
        ["text_offset", "token_logprobs", "tokens", "top_logprobs"]
    ] * 3


def test_a_stream_echoes_what_the_whole_answer_does(server: Server, client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"prompt": [TEXT, "Twice"], "max_tokens": 4, "logprobs": 1, "echo": True, "n": 2}
    whole = complete(server, **settings, seed=3, temperature=1)["choices"]
    streamed = client.completions.create(model=MODEL, **settings, seed=3, temperature=1, stream=True)
    texts = [""] * 4
    values: list[list[float | None]] = [[] for _ in range(4)]
    offsets: list[list[int]] = [[] for _ in range(4)]
    for chunk in streamed:
        [piece] = chunk.choices
        texts[piece.index] += piece.text
        if piece.logprobs is not None:
            values[piece.index] += piece.logprobs.token_logprobs or []
            offsets[piece.index] += piece.logprobs.text_offset or []
    assert texts == [choice["text"] for choice in whole]
    assert values == [choice["logprobs"]["token_logprobs"] for choice in whole]
    assert offsets == [choice["logprobs"]["text_offset"] for choice in whole]


def test_an_echo_without_log_probabilities_is_the_prompt_before_the_answer(server: Server) -> None:
    answer = complete(server, prompt=TEXT, max_tokens=5)["choices"][0]["text"]
    for more in ({}, {"n": 2}, {"best_of": 2}):
        choices = complete(server, prompt=TEXT, max_tokens=5, echo=True, **more)["choices"]
        assert {choice["text"] for choice in choices} == {TEXT + answer}
        assert choices[0]["logprobs"] is None
    assert complete(server, prompt=TEXT, max_tokens=0)["choices"][0]["text"] == ""


def test_a_drawn_token_stands_among_its_alternatives(server: Server) -> None:
    settings = {"prompt": TEXT, "max_tokens": 24, "temperature": 1.5, "seed": 5, "ignore_eos": True}
    logprobs = complete(server, **settings, logprobs=1)["choices"][0]["logprobs"]
    for value, token, top in zip(*(logprobs[key] for key in ("token_logprobs", "tokens", "top_logprobs")), strict=True):
        assert top[token] >= value
        assert len(top) in (1, 2)
    assert any(len(top) == 2 for top in logprobs["top_logprobs"]), "a draw that is not the likeliest"


def test_harnesses_send_more_than_four_stops(server: Server) -> None:
    stops = ["\nclass", "\ndef", "\n#", "\nif", "\nprint", "```"]
    assert complete(server, prompt=TEXT, max_tokens=4, stop=stops)["choices"][0]["finish_reason"] == "length"
    status, document = post(server, "/v1/completions", {"prompt": TEXT, "stop": ["a"] * 65})
    assert (status, document["error"]["code"]) == (400, "array_above_max_length")


def test_a_request_without_a_model_gets_the_first_one(server: Server) -> None:
    status, document = post(server, "/v1/completions", {"prompt": TEXT, "max_tokens": 1})
    assert (status, document["model"]) == (200, MODEL)


@pytest.mark.parametrize("value", ["yes", 1])
def test_an_echo_that_is_neither_true_nor_false_is_refused(server: Server, value: object) -> None:
    status, document = post(server, "/v1/completions", {"prompt": TEXT, "echo": value})
    assert (status, document["error"]["param"]) == (400, "echo")


def test_where_a_prompt_cannot_be_scored_echo_says_so(tiny_tensorrt_bundle: Path) -> None:
    limits = Limits((MODEL,), 64, 64, defaults=API_DEFAULTS)
    engine = Engine(tiny_tensorrt_bundle, backend="onnxruntime-cpu", max_seq=64, threads=1)
    with engine, ServingLoop(engine) as loop:
        service = Service(engine, loop, limits)
        client = TestClient(make_app(Served(service, None), max_body=2**20))
        refused = client.post("/v1/completions", json={"prompt": "Hi", "echo": True, "logprobs": 1})
        taken = client.post("/v1/completions", json={"prompt": "Hi", "echo": True, "max_tokens": 0})
        service.close()
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "echo"
    assert "has the log-probabilities of answers only" in refused.json()["error"]["message"]
    assert taken.json()["choices"][0]["text"] == "Hi"


# The tokenizer.


def test_tokens_of_a_text_there_and_back(server: Server, tokenizer: Tokenizer) -> None:
    """lm-eval's requests, and vLLM's answers."""
    plain = tokenizer.encode(TEXT, add_special_tokens=False)
    status, document = post(server, "/tokenize", {"prompt": TEXT, "add_special_tokens": False})
    assert (status, document) == (200, {"count": len(plain), "max_model_len": 512, "tokens": plain, "token_strs": None})
    assert post(server, "/tokenize", {"model": MODEL, "prompt": TEXT})[1]["tokens"] == tokenizer.encode(TEXT)
    named = post(server, "/tokenize", {"prompt": "The city", "return_token_strs": True})[1]
    assert named["token_strs"] == ["<s>", f"{SPACE}The", f"{SPACE}city"]
    assert post(server, "/detokenize", {"tokens": plain}) == (200, {"prompt": TEXT})
    ends = [1, *plain, 32000]
    assert post(server, "/detokenize", {"tokens": ends})[1]["prompt"].endswith("<|end_of_turn|>")
    assert post(server, "/detokenize", {"tokens": []})[1] == {"prompt": ""}


def test_tokens_of_a_chat_are_those_of_its_template(server: Server, tiny_bundle: Path) -> None:
    messages = [{"role": "user", "content": "Hi <|end_of_turn|>"}]
    with Engine(tiny_bundle, max_seq=64, threads=1) as engine:
        expected = engine.apply_chat_template(messages)
        without = engine.chat_templates.encode(messages, engine.tokenizer, add_generation_prompt=False)
        source = engine.chat_templates.source()
    body = {"messages": messages}
    assert post(server, "/tokenize", body)[1]["tokens"] == expected
    assert post(server, "/tokenize", body | {"add_generation_prompt": False})[1]["tokens"] == without
    status, _, content = server.request("GET", "/tokenizer_info")
    info = json.loads(content)
    assert status == 200
    assert (info["bos_token"], info["eos_token"], info["pad_token"]) == ("<s>", "<|end_of_turn|>", "<|pad_0|>")
    assert info["chat_template"] == source
    assert "GPT4 Correct User" in info["chat_template"]
    assert info["model_max_length"] == 512


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": CHAT}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": CHAT, "template": "none"}, "template"),
        (
            "/tokenize",
            {"messages": CHAT, "add_special_tokens": True},
            "add_special_tokens",
        ),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"prompt": "a", "add_special_token": True}, "add_special_token"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "model"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "1"}, "tokens"),
        ("/detokenize", {"tokens": [1, 32002]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens"),
    ],
    ids=str,
)
def test_what_cannot_be_tokenized_is_refused_by_name(
    server: Server, path: str, body: dict[str, Any], param: str
) -> None:
    status, document = post(server, path, body)
    assert status == (404 if param == "model" else 400)
    assert document["error"]["param"] == param


def test_keys_guard_all_that_works(tiny_bundle: Path) -> None:
    limits = Limits((MODEL,), 64, 64, defaults=API_DEFAULTS)
    with Engine(tiny_bundle, max_seq=64, threads=1) as engine, ServingLoop(engine) as loop:
        service = Service(engine, loop, limits)
        client = TestClient(make_app(Served(service, None), max_body=2**20, api_keys=["key"]))
        for path in ("/tokenize", "/detokenize", "/v1/completions", "/nothing"):
            assert client.post(path, json={"prompt": "a", "tokens": [5]}).status_code == 401
        assert client.get("/tokenizer_info").status_code == 401
        assert client.get("/tokenizer_info", headers={"Authorization": "Bearer key"}).status_code == 200
        assert [client.get(path).status_code for path in ("/health", "/ready", "/metrics")] == [200] * 3
        service.close()
