"""Penalties, biases, bad words and the minimum of tokens: their arithmetic by reference, their effect on a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import (
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from starling.engine import Engine, SamplingParams
from starling.engine.backends.backend import DeviceChoice
from starling.engine.errors import RequestFailed, SamplingError
from starling.engine.generation.logits_processors import BadWords, LogitsProcessor, logits_processors
from starling.engine.generation.sampler import device_choice, make_sampler
from starling.engine.serving_loop import ServingLoop

VOCAB, PROMPT = 300, [5, 9, 5, 200]
EVERYTHING = SamplingParams(
    repetition_penalty=1.3,
    presence_penalty=0.7,
    frequency_penalty=0.4,
    logit_bias={5: 2.5, 17: -100, 200: 1},
    max_tokens=64,
)
AS_IT_IS = SamplingParams(max_tokens=16, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Iterator[Engine]:
    with Engine(tiny_bundle, backend="onnxruntime-cpu", max_seq=64, threads=1) as engine:
        yield engine


def random_logits(seed: int) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(VOCAB) * 3).astype(np.float32)


def by_reference(logits: NDArray[np.float32], answer: list[int], params: SamplingParams) -> NDArray[np.float64]:
    """transformers' bias and repetition penalty, then OpenAI's formula for the other two:
    mu[j] - c[j] * frequency - float(c[j] > 0) * presence."""
    processors = LogitsProcessorList(
        [
            SequenceBiasLogitsProcessor([[[token], float(bias)] for token, bias in dict(params.logit_bias).items()]),
            RepetitionPenaltyLogitsProcessor(params.repetition_penalty),
        ]
    )
    history: Any = torch.tensor([PROMPT + answer])
    scores = processors(history, torch.from_numpy(logits.astype(np.float64))[None])[0].numpy()
    counts = np.bincount(answer, minlength=VOCAB)
    return scores - counts * params.frequency_penalty - (counts > 0) * params.presence_penalty


def test_bias_and_penalties_are_those_of_the_reference_step_by_step(engine: Engine) -> None:
    processors = logits_processors(EVERYTHING, PROMPT, engine.tokenizer, end_ids=(2,), vocab_size=VOCAB)
    answer: list[int] = []
    for step in range(200):
        logits = random_logits(step % 5)
        changed = logits.copy()
        for processor in processors:
            processor(changed)
        expected = by_reference(logits, answer, EVERYTHING)
        np.testing.assert_allclose(changed, expected, atol=1e-5, rtol=1e-5)
        answer.append(int(expected.argmax()))
        for processor in processors:
            processor.accept(answer[-1])
    assert len(set(answer)) > 80  # more than the 64 with which the arrays begin


def test_bad_words_are_masked_as_transformers_masks_them_in_the_answer() -> None:
    sequences = [(7,), (5, 9), (5, 9, 11), (200, 5, 9, 4), (9, 9)]
    reference = NoBadWordsLogitsProcessor([[*ids] for ids in sequences], eos_token_id=None)
    ours, answer, rng = BadWords(sequences), list[int](), np.random.default_rng(3)
    for step in range(300):
        logits = random_logits(step)
        changed = logits.copy()
        ours(changed)
        ids: Any = torch.tensor([answer], dtype=torch.long)
        wanted = reference(ids, torch.from_numpy(logits)[None])[0].numpy()
        assert np.array_equal(changed, wanted)
        answer.append(int(rng.choice([5, 9, 11, 200, 4])))
        ours.accept(answer[-1])


def test_a_sampler_leaves_the_backends_logits_alone() -> None:
    class Overwrite:
        def __call__(self, logits: NDArray[np.float32], /) -> None:
            logits[:] = -np.inf
            logits[3] = 0

        def accept(self, token: int, /) -> None:
            assert token == 3

    logits = random_logits(1)
    logits.setflags(write=False)
    assert make_sampler(SamplingParams(), [Overwrite()])(logits) == 3
    assert np.array_equal(logits, random_logits(1))


def test_the_device_chooses_only_where_nothing_changes_the_logits() -> None:
    drawn = SamplingParams(temperature=1.0, top_k=5, seed=1)
    assert isinstance(device_choice(drawn), DeviceChoice)
    for change in ({"presence_penalty": 1}, {"frequency_penalty": -1}, {"logit_bias": {1: 1}}, {"bad_words": ("a",)}):
        values: dict[str, Any] = change
        assert device_choice(replace(drawn, **values)) is None
        assert device_choice(replace(SamplingParams(), **values)) is None
        assert not replace(SamplingParams(), **values).is_greedy
    assert device_choice(replace(drawn, min_tokens=1)) is None


def test_an_end_token_cannot_be_chosen_before_min_tokens(engine: Engine) -> None:
    plain = engine.generate("Once", AS_IT_IS)
    ends = tuple(set(plain.tokens[:6]))
    assert engine.generate("Once", AS_IT_IS, stop_token_ids=ends).finish_reason == "stop"
    longer = engine.generate("Once", AS_IT_IS, stop_token_ids=ends, min_tokens=9)
    assert not set(longer.tokens[:9]) & set(ends)
    exact = engine.generate(
        "Once", AS_IT_IS, stop_token_ids=(plain.tokens[0],), logit_bias={plain.tokens[0]: 100}, min_tokens=4
    )
    assert (len(exact.tokens), exact.finish_reason, exact.tokens[4]) == (5, "stop", plain.tokens[0])


def test_a_stop_string_is_looked_for_after_min_tokens(engine: Engine) -> None:
    plain = engine.generate("Once", AS_IT_IS)
    first = next(char for char in plain.text if char.isalpha())
    assert len(engine.generate("Once", AS_IT_IS, stop=[first]).tokens) < 9
    later = engine.generate("Once", AS_IT_IS, stop=[first], min_tokens=9)
    assert later.tokens == plain.tokens[: len(later.tokens)]
    assert len(later.tokens) > 9 or first not in later.text[-20:]
    whole = engine.generate("Once", AS_IT_IS, stop=[first], min_tokens=16)
    assert (whole.text, whole.finish_reason) == (plain.text, "length")


def test_a_bad_word_is_not_written(engine: Engine) -> None:
    plain = engine.generate("Once", AS_IT_IS)
    word = engine.tokenizer.decode(plain.tokens[2:4]).strip()
    ids = {tuple(engine.tokenizer.encode(space + word, add_special_tokens=False)) for space in ("", " ")}
    result = engine.generate("Once", AS_IT_IS, bad_words=[word])
    for forbidden in ids:
        n = len(forbidden)
        assert all(result.tokens[i : i + n] != forbidden for i in range(len(result.tokens)))


def test_logprobs_are_those_of_the_models_own_logits(engine: Engine) -> None:
    plain = engine.generate("Once", AS_IT_IS, logprobs=1)
    assert plain.logprobs is not None
    other = (plain.tokens[0] + 1) % 1000
    biased = engine.generate("Once", AS_IT_IS, logprobs=1, logit_bias={other: 100})
    assert biased.logprobs is not None
    assert biased.tokens[0] == other
    assert biased.logprobs[0].top == plain.logprobs[0].top
    assert biased.logprobs[0].logprob < plain.logprobs[0].logprob


def test_tokens_that_the_model_lacks_are_refused(engine: Engine) -> None:
    with pytest.raises(SamplingError, match=r"logit_bias has the token id 32002, but the model has 0 to 32001"):
        engine.generate("Once", logit_bias={32002: 1})
    with pytest.raises(SamplingError, match=r"bad_words\[1\] is no text that the model could write"):
        engine.generate("Once", bad_words=["fine", " "])


def test_a_request_that_forbids_every_token_fails_alone_and_says_why(engine: Engine) -> None:
    class Nothing:
        def __call__(self, logits: NDArray[np.float32], /) -> None:
            logits[:] = -np.inf

        def accept(self, token: int, /) -> None:
            raise AssertionError(token)

    nothing: list[LogitsProcessor] = [Nothing()]
    with ServingLoop(engine) as loop:
        with pytest.raises(RequestFailed, match="leaves no token to choose"):
            loop.submit("Once", AS_IT_IS, processors=nothing).result(60)
        assert len(loop.submit("Once", AS_IT_IS).result(60).tokens) == 16
