"""Texts are run together, alone or in chunks: the scores are the same, and no text waits for one of another length."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from tiny_scorers import texts

from starling.engine.bundle.model_records import Pooling
from starling.engine.engine import Engine
from starling.engine.errors import BackendError, PromptError, UserError
from starling.engine.pooling.runs import next_group
from starling.engine.pooling.text_pooler import activated, normalized
from starling.engine.pooling.texts import cut, read_part
from starling.engine.serving_loop import ServingLoop


@pytest.fixture(scope="module")
def engine(reward_bundle: Path) -> Iterator[Engine]:
    with Engine(reward_bundle, max_batch=8) as opened:
        yield opened


@pytest.mark.parametrize("run_tokens", [256, 100, 33, 16])
def test_a_text_scores_the_same_together_and_alone(engine: Engine, run_tokens: int) -> None:
    rows = texts((1, 2, 5, 17, 40, 100, 3, 30, 300, 512, 40, 40, 41, 7, 16, 33, 34))
    alone = np.concatenate([engine.score_texts([row]) for row in rows])
    engine.pooler.backend.run_tokens, before = run_tokens, engine.pooler.backend.run_tokens
    try:
        together = engine.score_texts(rows)
    finally:
        engine.pooler.backend.run_tokens = before
    assert np.abs(together - alone).max() < 1e-4
    assert alone.std() > 0.5


def test_short_texts_share_runs(engine: Engine) -> None:
    """Eight texts of 30 tokens take one run of the model, of which each costs as long as its tokens together."""
    backend, runs = engine.pooler.backend, 0
    run = backend.run

    def counted(*arguments: Any) -> Any:
        nonlocal runs
        runs += 1
        return run(*arguments)

    cast(Any, backend).run = counted
    try:
        engine.score_texts(texts((30,) * 8))
        assert runs == 1
        engine.score_texts(texts((30,) * 9))
        assert runs == 3
    finally:
        cast(Any, backend).run = run


class _Backend:
    max_batch, run_tokens = 4, 256


@pytest.mark.parametrize(
    ("lengths", "group"),
    [
        ([30, 29, 31, 30], [0, 3, 1, 2]),
        ([30] * 9, [0, 1, 2, 3]),
        ([10, 200, 12, 11], [0, 3, 2]),
        ([200, 10, 12], [0]),
        ([60, 90, 61], [0, 2]),
        ([100, 100, 100], [0, 1]),
    ],
)
def test_texts_of_like_length_run_together(lengths: list[int], group: list[int]) -> None:
    rows = [[number] * length for number, length in enumerate(lengths)]
    assert next_group(rows, cast(Any, _Backend())) == group


def test_texts_that_are_rotated_otherwise_run_apart() -> None:
    assert next_group([[1] * 65, [1] * 64, [2] * 66], cast(Any, _Backend()), long_from=64) == [0, 2]
    assert next_group([[1] * 20, [2] * 65], cast(Any, _Backend()), long_from=64) == [0]


def test_texts_with_one_beginning_run_it_once(engine: Engine) -> None:
    """Eight answers to one question: its tokens once, and theirs."""
    backend, ran = engine.pooler.backend, 0
    run = backend.run
    question, answers = texts((100,))[0], texts((20, 31, 7, 40, 25, 25, 1, 60), seed=2)
    rows = [[*question, *answer] for answer in answers]
    alone = np.concatenate([engine.score_texts([row]) for row in rows])

    def counted(cache: Any, tokens: Any, *rest: Any) -> Any:
        nonlocal ran
        ran += tokens.size
        return run(cache, tokens, *rest)

    cast(Any, backend).run = counted
    try:
        together = engine.score_texts(rows)
    finally:
        cast(Any, backend).run = run
    assert ran == 100 + sum(map(len, answers))
    assert np.abs(together - alone).max() < 1e-4


def test_the_same_text_twice_is_read_twice(engine: Engine) -> None:
    [row] = texts((200,))
    [one], [other] = engine.score_texts([row, row])
    assert one == pytest.approx(other, abs=1e-4)
    assert one == pytest.approx(float(engine.score_texts([row])[0, 0]), abs=1e-4)


def test_no_keys_and_values_are_kept(engine: Engine) -> None:
    assert engine.kv_cache_bytes == 0


@pytest.mark.parametrize(
    ("ids", "most", "side", "kept"),
    [
        ([1, 5, 6, 7], 4, "left", [1, 5, 6, 7]),
        ([1, 5, 6, 7], 3, "left", [1, 6, 7]),
        ([1, 5, 6, 7], 1, "left", [7]),
        ([5, 6, 7], 2, "left", [6, 7]),
        ([1, 5, 6, 2], 3, "right", [1, 5, 2]),
        ([1, 5, 6, 7], 3, "right", [1, 5, 6]),
    ],
)
def test_a_long_text_is_cut_within_what_the_tokenizer_adds(
    ids: list[int], most: int, side: Any, kept: list[int]
) -> None:
    assert cut(ids, most, side, before=[1], after=[2]) == kept


@pytest.mark.parametrize(
    ("read_at", "ids", "read"),
    [
        ("last", [5, 0, 6, 0], [5, 0, 6, 0]),
        ("last_but_pad", [5, 0, 6, 0, 0], [5, 0, 6]),
        ("last_but_pad", [0, 0], [0]),
        ("before_first_pad", [5, 6, 0, 7], [5, 6]),
        ("before_first_pad", [0, 5, 6], [0, 5, 6]),
        ("before_first_pad", [5, 6], [5, 6]),
    ],
)
def test_what_comes_after_the_token_that_is_read_is_not_run(read_at: Any, ids: list[int], read: list[int]) -> None:
    assert read_part(ids, Pooling(("a",), read_at, 0)) == read


def test_texts_chats_and_ids_are_taken(engine: Engine) -> None:
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    text = "GPT4 Correct User: Hello<|end_of_turn|>GPT4 Correct Assistant: Hi<|end_of_turn|>"
    scores = engine.score_texts([messages, text, engine.tokenizer.encode(text), np.array([1, 5])])
    assert scores[0] == scores[1] == scores[2]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("Hello", "one text alone"),
        ([1, 2], "one text alone"),
        ([{"role": "user", "content": "a"}], "one text alone"),
        ([""], "empty"),
        ([[]], "empty"),
        ([[1, 99999]], "token id 99999 at position 1"),
        ([["a"]], "text or a list of token ids"),
        ([[{"role": "user"}]], "message 0"),
        ([None], "one text alone"),
        (["a", None], "a text is a NoneType"),
    ],
)
def test_what_is_no_text_is_refused(engine: Engine, given: Any, named: str) -> None:
    with pytest.raises(PromptError, match=named):
        engine.score_texts(given)


def test_no_texts_have_no_scores(engine: Engine) -> None:
    assert engine.score_texts([]).shape == (0, 1)


def test_a_text_that_may_not_be_cut_is_refused(classifier_bundle: Path) -> None:
    with Engine(classifier_bundle, max_seq=8) as engine:
        assert engine.score_texts([[1] * 8]).shape == (1, 3)
        with pytest.raises(PromptError, match="has 9 tokens") as refusal:
            engine.score_texts([[1] * 9])
        assert refusal.value.code == "context_length_exceeded"
        assert engine.score_texts([[1] * 9], truncate=-1).shape == (1, 3)
        for wrong in (0, 9, -2):
            with pytest.raises(UserError, match=f"truncate is {wrong}"):
                engine.score_texts([[1]], truncate=wrong)


def test_a_bundle_that_scores_generates_nothing(engine: Engine) -> None:
    for use in (
        lambda: engine.generate("a"),
        lambda: engine.stream("a"),
        lambda: engine.chat().stream("a"),
        lambda: engine.embed_texts(["a"]),
        lambda: ServingLoop(engine),
    ):
        with pytest.raises(UserError, match="scores texts, it generates none: use starling score"):
            use()


def test_a_bundle_that_generates_scores_nothing(tiny_bundle: Path) -> None:
    with Engine(tiny_bundle) as engine:
        for use in (engine.score_texts, engine.embed_texts):
            with pytest.raises(UserError, match="generates text, it neither scores nor embeds"):
                use(["a"])


@pytest.mark.parametrize("backend", ["onnxruntime-cuda", "tensorrt", "tensorrt-rtx"])
def test_what_does_not_score_is_refused_by_name(reward_bundle: Path, backend: str) -> None:
    with pytest.raises(BackendError, match=f"backend {backend} does not run bundles that score"):
        Engine(reward_bundle, backend=backend)


def test_probabilities_are_those_of_transformers_pipelines() -> None:
    scores = np.array([[1.0, -2.0, 800.0], [0.0, 0.0, 0.0]], np.float32)
    three = ("a", "b", "c")
    assert np.allclose(activated(scores, Pooling(three)), [[0, 0, 1], [1 / 3] * 3])
    several = activated(scores, Pooling(three, problem_type="multi_label_classification"))
    assert np.allclose(several, [[0.7310586, 0.1192029, 1], [0.5] * 3])
    assert np.array_equal(activated(scores, Pooling(three, problem_type="regression")), scores)
    one = activated(np.array([[-800.0], [0.0]], np.float32), Pooling(("a",)))
    assert np.allclose(one, [[0], [0.5]])


def test_embeddings_have_length_one_where_asked_for(embedding_bundle: Path) -> None:
    with Engine(embedding_bundle) as engine:
        vectors = engine.embed_texts(["Hello", "How are you?"])
    assert vectors.shape == (2, 256)
    assert np.allclose(np.linalg.norm(normalized(vectors), axis=1), 1)
    assert np.array_equal(normalized(np.zeros((1, 3), np.float32)), np.zeros((1, 3)))
