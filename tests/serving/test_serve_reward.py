"""A server of a model that scores or embeds, alone or beside one that generates, in the shapes of vLLM and OpenAI."""

import base64
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from http_server import MODEL, Server, serving
from prometheus_client.parser import text_string_to_metric_families

from starling.engine.engine import Engine
from starling.serving.http.scoring_bodies import SCORING_FIELDS

PAGE = (Path(__file__).parents[2] / "docs" / "http.md").read_text(encoding="utf-8")

CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
TEXTS = ["Hello", "How are you? I am fine.", "One more text that is a good deal longer than the others are."]


@pytest.fixture(scope="module")
def rewarding(reward_bundle: Path) -> Iterator[Server]:
    with serving(reward_bundle, "--max-batch", "4") as server:
        yield server


@pytest.fixture(scope="module")
def both(tiny_bundle: Path, reward_bundle: Path) -> Iterator[Server]:
    with serving(tiny_bundle, "--reward-model", reward_bundle, "--max-batch", "4", "--max-seq", "128") as server:
        yield server


@pytest.fixture(scope="module")
def classifying(classifier_bundle: Path) -> Iterator[Server]:
    with serving(classifier_bundle) as server:
        yield server


@pytest.fixture(scope="module")
def embedding(embedding_bundle: Path) -> Iterator[Server]:
    with serving(embedding_bundle) as server:
        yield server


def scores(bundle: Path, texts: list[Any]) -> list[float]:
    with Engine(bundle) as engine:
        found: list[float] = engine.score_texts(texts)[:, 0].tolist()
    return found


def post(server: Server, path: str, **fields: Any) -> dict[str, Any]:
    status, _, content = server.request("POST", path, fields)
    assert status == 200, content
    document: dict[str, Any] = json.loads(content)
    return document


def error(server: Server, path: str, **fields: Any) -> tuple[int, dict[str, Any]]:
    status, _, content = server.request("POST", path, fields)
    return status, json.loads(content)["error"]


def test_the_page_has_the_fields_of_the_code() -> None:
    section = PAGE.split("\n## Scores and embeddings\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert listed == {name for names in SCORING_FIELDS.values() for name in names}


def test_pooling_gives_raw_scores_of_texts_ids_and_chats(rewarding: Server, reward_bundle: Path) -> None:
    expected = scores(reward_bundle, [*TEXTS, [1, 5, 6], CHAT])
    answer = post(rewarding, "/pooling", model=MODEL, input=TEXTS)
    assert [item["data"] for item in answer["data"]] == [[pytest.approx(score, abs=1e-4)] for score in expected[:3]]
    assert [(item["index"], item["object"]) for item in answer["data"]] == [(i, "pooling") for i in range(3)]
    assert (answer["object"], answer["model"]) == ("list", MODEL)
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > 20
    ids = post(rewarding, "/pooling", model=MODEL, input=[1, 5, 6])
    assert ids["data"][0]["data"] == [pytest.approx(expected[3], abs=1e-4)]
    assert ids["usage"]["prompt_tokens"] == 3
    chat = post(rewarding, "/pooling", messages=CHAT, task="classify")  # the only model, unnamed
    assert chat["data"][0]["data"] == [pytest.approx(expected[4], abs=1e-4)]
    packed = post(rewarding, "/pooling", input="Hello", encoding_format="base64")["data"][0]["data"]
    assert np.frombuffer(base64.b64decode(packed), "<f4") == pytest.approx(expected[:1], abs=1e-4)


def test_classify_names_the_label(classifying: Server, classifier_bundle: Path) -> None:
    with Engine(classifier_bundle) as engine:
        raw = engine.score_texts(TEXTS)
    answer = post(classifying, "/classify", model=MODEL, input=TEXTS)
    assert [item["probs"] for item in answer["data"]] == [pytest.approx(row.tolist(), abs=1e-4) for row in raw]
    labels = ["bad", "so so", "good"]
    assert [item["label"] for item in answer["data"]] == [labels[int(row.argmax())] for row in raw]
    assert {item["num_classes"] for item in answer["data"]} == {3}
    shares = post(classifying, "/classify", model=MODEL, input=TEXTS, use_activation=True)["data"]
    assert [sum(item["probs"]) for item in shares] == pytest.approx([1, 1, 1])
    powers = np.exp(raw) / np.exp(raw).sum(axis=1, keepdims=True)
    assert shares[0]["probs"] == pytest.approx(powers[0].tolist(), abs=1e-4)


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_pairs_are_scored_as_chats(rewarding: Server, reward_bundle: Path, path: str) -> None:
    chats = [[{"role": "user", "content": "Hello"}, {"role": "assistant", "content": text}] for text in TEXTS]
    expected = scores(reward_bundle, chats)
    for fields in (
        {"text_1": "Hello", "text_2": TEXTS},
        {"text_1": ["Hello"] * 3, "text_2": TEXTS},
        {"queries": "Hello", "documents": TEXTS},
    ):
        answer = post(rewarding, path, model=MODEL, **fields)
        assert [item["score"] for item in answer["data"]] == pytest.approx(expected, abs=1e-4)
        assert {item["object"] for item in answer["data"]} == {"score"}
    one = post(rewarding, path, text_1="Hello", text_2=TEXTS[0], use_activation=True)["data"][0]["score"]
    assert one == pytest.approx(1 / (1 + np.exp(-expected[0])), abs=1e-4)


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_documents_are_ranked(rewarding: Server, reward_bundle: Path, path: str) -> None:
    chats = [[{"role": "user", "content": "Hello"}, {"role": "assistant", "content": text}] for text in TEXTS]
    expected = scores(reward_bundle, chats)
    order = sorted(range(3), key=lambda index: -expected[index])
    answer = post(rewarding, path, model=MODEL, query="Hello", documents=[TEXTS[0], {"text": TEXTS[1]}, TEXTS[2]])
    assert [result["index"] for result in answer["results"]] == order
    assert [result["relevance_score"] for result in answer["results"]] == pytest.approx(
        [expected[index] for index in order], abs=1e-4
    )
    assert [result["document"]["text"] for result in answer["results"]] == [TEXTS[index] for index in order]
    best = post(rewarding, path, query="Hello", documents=TEXTS, top_n=1, return_documents=False)["results"]
    assert [result["index"] for result in best] == order[:1]
    assert "document" not in best[0]


def test_a_text_without_a_template_is_paired_as_the_tokenizer_pairs(classifying: Server) -> None:
    status, refused = error(classifying, "/score", text_1="a", text_2="b")
    assert status == 400
    assert "gives 3 scores of a text, not one: use /classify" in refused["message"]


def test_embeddings_are_what_openais_client_reads(embedding: Server, embedding_bundle: Path) -> None:
    with Engine(embedding_bundle) as engine:
        raw = engine.embed_texts(TEXTS)
    unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    client = embedding.client()
    for encoding in ({}, {"encoding_format": "float"}):  # the client asks for base64 by itself
        found = client.embeddings.create(model=MODEL, input=TEXTS, **encoding)  # type: ignore[call-overload]
        assert np.abs(np.array([item.embedding for item in found.data]) - unit).max() < 1e-5
        assert found.usage.prompt_tokens == found.usage.total_tokens > 20
    plain = post(embedding, "/v1/embeddings", model=MODEL, input="Hello", use_activation=False)
    assert np.abs(np.array(plain["data"][0]["embedding"]) - raw[0]).max() < 1e-4
    with pytest.raises(openai.BadRequestError, match="dimensions is not supported"):
        client.embeddings.create(model=MODEL, input="a", dimensions=8)


def test_two_models_stand_side_by_side(both: Server, reward_bundle: Path) -> None:
    client = both.client()
    assert [model.id for model in client.models.list().data] == [MODEL, reward_bundle.name]
    assert json.loads(both.request("GET", f"/v1/models/{reward_bundle.name}")[2])["max_model_len"] == 512
    assert client.completions.create(model=MODEL, prompt="Once", max_tokens=2).usage.completion_tokens == 2
    found = post(both, "/pooling", model=reward_bundle.name, input="Hello")["data"][0]["data"]
    assert found == pytest.approx(scores(reward_bundle, ["Hello"]), abs=1e-4)
    assert error(both, "/pooling", model=MODEL, input="a")[0] == 404
    with pytest.raises(openai.NotFoundError, match=f"there is no model '{reward_bundle.name}' here"):
        client.completions.create(model=reward_bundle.name, prompt="Once")


def test_a_server_without_such_a_model_says_so(rewarding: Server, embedding: Server, both: Server) -> None:
    for server in (rewarding, embedding):
        with pytest.raises(openai.NotFoundError, match=f"no model here generates text: {MODEL} is for the task"):
            server.client().completions.create(model=MODEL, prompt="Once")
        with pytest.raises(openai.NotFoundError, match="no model here generates text"):
            server.client().chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "a"}])
    assert "no model here embeds texts" in error(rewarding, "/v1/embeddings", input="a")[1]["message"]
    assert "no model here scores texts" in error(embedding, "/classify", input="a")[1]["message"]
    assert "no model here embeds texts" in error(both, "/v1/embeddings", input="a")[1]["message"]


def test_a_server_that_only_generates_says_so(tiny_bundle: Path) -> None:
    with serving(tiny_bundle) as server:
        for path in ("/classify", "/pooling", "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"):
            status, refused = error(server, path, input="a")
            assert status == 404
            assert "no model here scores texts" in refused["message"]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/classify", {}, "input"),
        ("/classify", {"input": 5}, "input"),
        ("/classify", {"input": []}, "input"),
        ("/classify", {"input": ["a", 5]}, "input"),
        ("/classify", {"input": [1, "a"]}, "input"),
        ("/classify", {"input": ""}, "input"),
        ("/classify", {"input": [99999]}, "input"),
        ("/classify", {"input": "a", "messages": CHAT}, "input"),
        ("/classify", {"messages": []}, "messages"),
        ("/classify", {"messages": CHAT, "template": "none"}, "template"),
        ("/classify", {"input": ["a"] * 2049}, "input"),
        ("/classify", {"input": "a", "use_activation": 1}, "use_activation"),
        ("/classify", {"input": "a", "use_activations": True}, "use_activations"),
        ("/classify", {"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ("/classify", {"input": "a", "truncation_side": "top"}, "truncation_side"),
        ("/classify", {"input": "a", "deadline_s": 0}, "deadline_s"),
        ("/pooling", {"input": "a", "task": "embed"}, "task"),
        ("/pooling", {"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ("/score", {"text_1": "a"}, "text_2"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["a"]}, "text_1"),
        ("/score", {"text_1": ["a", 5], "text_2": "a"}, "text_1"),
        ("/rerank", {"query": "a"}, "documents"),
        ("/rerank", {"query": "a", "documents": []}, "documents"),
        ("/rerank", {"query": "a", "documents": [{"title": "b"}]}, "documents"),
        ("/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n"),
    ],
)
def test_what_cannot_be_scored_is_refused_by_its_field(
    rewarding: Server, path: str, fields: dict[str, Any], param: str
) -> None:
    status, refused = error(rewarding, path, **fields)
    assert (status, refused["param"]) == (400, param), refused


def test_a_long_text_is_cut_or_refused(rewarding: Server, classifying: Server) -> None:
    long = [5] * 600
    assert post(rewarding, "/pooling", input=long)["usage"]["prompt_tokens"] == 512  # as the model's own rule says
    assert post(rewarding, "/pooling", input=long, truncate_prompt_tokens=7)["usage"]["prompt_tokens"] == 7
    status, refused = error(classifying, "/classify", input=long)
    assert (status, refused["code"]) == (400, "context_length_exceeded")
    assert post(classifying, "/classify", input=long, truncate_prompt_tokens=-1)["usage"]["prompt_tokens"] == 128


def test_requests_at_the_same_time_are_all_answered(rewarding: Server, reward_bundle: Path) -> None:
    lists = [[f"text {i}", "b" * i] for i in range(1, 25)]
    expected = [
        scores_of for scores_of in np.array(scores(reward_bundle, [t for texts in lists for t in texts])).reshape(-1, 2)
    ]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda texts: post(rewarding, "/pooling", input=texts), lists))
    for answer, wanted in zip(answers, expected, strict=True):
        assert [item["data"][0] for item in answer["data"]] == pytest.approx(list(wanted), abs=1e-4)


def test_keys_guard_every_path_but_health_and_metrics(reward_bundle: Path) -> None:
    with serving(reward_bundle, env={"STARLING_API_KEY": "key"}) as server:
        for path in ("/classify", "/pooling", "/score", "/rerank", "/v2/rerank", "/v1/embeddings"):
            assert server.request("POST", path, {"input": "a"})[0] == 401, path
        authorized = {"Authorization": "Bearer key"}
        assert server.request("POST", "/pooling", {"input": "a"}, authorized)[0] == 200
        assert {server.request("GET", path)[0] for path in ("/health", "/ready", "/metrics")} == {200}


def test_the_log_has_the_texts_tokens_and_the_deadline_holds(rewarding: Server) -> None:
    post(rewarding, "/pooling", input=[1, 5, 6])
    time.sleep(0.2)
    assert any("POST /pooling 200" in line and "prompt_tokens=3" in line for line in rewarding.log)
    status, refused = error(rewarding, "/pooling", input=[[5] * 512] * 300, deadline_s=0.01)
    assert (status, refused["code"]) == (504, "deadline_exceeded")
    assert post(rewarding, "/pooling", input=[1, 5, 6])["usage"]["prompt_tokens"] == 3  # what was late runs no more


def best(server: Server, path: str, reward: Path, **fields: Any) -> dict[str, Any]:
    return post(server, path, model=MODEL, temperature=1, seed=5, max_tokens=9, reward_model=reward.name, **fields)


def test_the_best_of_several_answers_is_the_one_of_the_highest_reward(both: Server, reward_bundle: Path) -> None:
    """The candidates are those of `n` without a reward model; each one's reward is what the model gives its chat."""
    user = [{"role": "user", "content": "Hello"}]
    asked: dict[str, Any] = {"model": MODEL, "messages": user, "temperature": 1, "seed": 5, "max_tokens": 9, "n": 4}
    plain = post(both, "/v1/chat/completions", **asked)
    answers = [choice["message"]["content"] for choice in plain["choices"]]
    chats = [[*user, {"role": "assistant", "content": answer}] for answer in answers]
    expected = scores(reward_bundle, chats)
    order = sorted(range(4), key=lambda index: -expected[index])
    assert len(set(answers)) == 4

    found = best(both, "/v1/chat/completions", reward_bundle, messages=user, best_of=4)
    [choice] = found["choices"]
    assert choice["message"]["content"] == answers[order[0]]
    assert choice["reward"] == pytest.approx(expected[order[0]], abs=1e-4)
    assert found["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"]
    assert found["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]
    with Engine(reward_bundle) as engine:
        read = sum(engine.pooler.prepare(chat).tokens for chat in chats)
    assert found["usage"]["reward_tokens"] == read

    sorted_all = best(both, "/v1/chat/completions", reward_bundle, messages=user, n=4)["choices"]
    assert [choice["message"]["content"] for choice in sorted_all] == [answers[index] for index in order]
    assert [choice["reward"] for choice in sorted_all] == pytest.approx([expected[i] for i in order], abs=1e-4)


def test_a_completion_is_judged_with_its_prompt(both: Server, reward_bundle: Path, tiny_bundle: Path) -> None:
    with Engine(tiny_bundle) as engine:
        ids = engine.tokenizer.encode("Once upon")
    for prompt in ("Once upon", ids, ["Once upon", "Twice"]):
        found = best(both, "/v1/completions", reward_bundle, prompt=prompt, n=1, best_of=2)["choices"]
        texts = ["Once upon", "Twice"][: len(found)]
        expected = scores(reward_bundle, [text + one["text"] for text, one in zip(texts, found, strict=True)])
        assert [choice["reward"] for choice in found] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"reward_model": "nobody"}, "there is no reward model 'nobody' here: use reward"),
        ({"reward_model": "reward", "stream": True}, "without stream"),
        ({"reward_model": "reward", "n": 2, "best_of": 1}, "best_of is 1, but n is 2"),
        ({"reward_model": 5}, "reward_model is 5"),
    ],
)
def test_what_cannot_be_judged_is_refused(both: Server, fields: dict[str, Any], named: str) -> None:
    for path, prompt in (("completions", {"prompt": "a"}), ("chat/completions", {"messages": CHAT[:1]})):
        status, refused = error(both, f"/v1/{path}", model=MODEL, max_tokens=2, **prompt, **fields)
        assert status == 400
        assert named in refused["message"]


def test_an_answer_that_the_reward_model_cannot_read_is_refused(tiny_bundle: Path, classifier_bundle: Path) -> None:
    """A model of three labels says of no answer that it is the best."""
    with serving(tiny_bundle, "--reward-model", classifier_bundle, "--max-seq", "64") as server:
        status, refused = error(server, "/v1/completions", prompt="a", reward_model=classifier_bundle.name)
        assert (status, refused["param"]) == (400, "reward_model")
        assert post(server, "/classify", model=classifier_bundle.name, input="a")["data"][0]["num_classes"] == 3


def metric(server: Server, name: str, model: str, **labels: str) -> float:
    """One sample of /metrics."""
    content = server.request("GET", "/metrics")[2].decode()
    [family] = [
        sample.value
        for family in text_string_to_metric_families(content)
        for sample in family.samples
        if sample.name == name and sample.labels == {"model_name": model, "engine": "0", **labels}
    ]
    return float(family)


def test_requests_for_scores_are_in_the_metrics(reward_bundle: Path) -> None:
    with serving(reward_bundle) as server:
        used = [post(server, "/pooling", model=MODEL, input=["Hello", "How are you?"])["usage"] for _ in range(3)]
        assert error(server, "/pooling", input="")[0] == 400, "never submitted"
        tokens = sum(usage["prompt_tokens"] for usage in used)
        assert metric(server, "vllm:request_success_total", MODEL, finished_reason="stop") == 3
        assert metric(server, "vllm:request_success_total", MODEL, finished_reason="abort") == 0
        for name in ("request_queue_time", "request_prefill_time", "e2e_request_latency"):
            assert metric(server, f"vllm:{name}_seconds_count", MODEL) == 3
        queued, prefilled, whole = (
            metric(server, f"vllm:{name}_seconds_sum", MODEL)
            for name in ("request_queue_time", "request_prefill_time", "e2e_request_latency")
        )
        assert 0 < prefilled < whole
        assert queued + prefilled == pytest.approx(whole)
        assert metric(server, "vllm:request_prompt_tokens_sum", MODEL) == tokens
        assert metric(server, "vllm:prompt_tokens_total", MODEL) == tokens
        assert metric(server, "vllm:generation_tokens_total", MODEL) == 0
        for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            assert metric(server, f"vllm:{gauge}", MODEL) == 0


def test_two_models_share_the_metrics_page(both: Server, reward_bundle: Path) -> None:
    reward = reward_bundle.resolve().name
    names = ("vllm:request_success_total", "vllm:e2e_request_latency_seconds_count")
    labels = ({"finished_reason": "stop"}, {})
    before = [metric(both, name, reward, **more) for name, more in zip(names, labels, strict=True)]
    generated = metric(both, "vllm:e2e_request_latency_seconds_count", MODEL)
    post(both, "/pooling", model=reward, input="Hello")
    after = [metric(both, name, reward, **more) for name, more in zip(names, labels, strict=True)]
    assert after == [count + 1 for count in before]
    assert metric(both, "vllm:e2e_request_latency_seconds_count", MODEL) == generated
    page = both.request("GET", "/metrics")[2].decode()
    described = [line for line in page.splitlines() if line.startswith("# TYPE")]
    assert len(described) == len(set(described)) > 20
    assert any("process_resident_memory_bytes" in line for line in described)
