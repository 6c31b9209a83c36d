"""Tokens are chosen with the probabilities that transformers' logits processors would leave."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from starling.engine.errors import BackendError, SamplingError
from starling.engine.generation.logits_processors import RepetitionPenalty
from starling.engine.generation.sampler import Sampler, logprobs, make_sampler, top_candidates
from starling.engine.generation.sampling_params import PENALTIES, SamplingParams

Logits = NDArray[np.float32]


def random_logits(size: int, seed: int, spread: float = 3.0) -> Logits:
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


def by_transformers(logits: Logits, params: SamplingParams, prompt: list[int]) -> NDArray[np.float64]:
    """The probabilities from which `generate` would draw, with its processors in its order."""
    processors = LogitsProcessorList()
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    processors.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    ids: Any = torch.tensor([prompt], dtype=torch.long)
    scores = processors(ids, torch.from_numpy(logits.astype(np.float64))[None])
    return torch.softmax(scores, dim=-1)[0].numpy()


def sampler_of(params: SamplingParams, prompt: list[int]) -> Sampler:
    penalty = params.repetition_penalty
    return make_sampler(params, [RepetitionPenalty(penalty, prompt)] if penalty != 1 else [])


def drawn_frequencies(logits: Logits, params: SamplingParams, prompt: list[int], draws: int) -> NDArray[np.float64]:
    counts = np.zeros(logits.size)
    if params.repetition_penalty == 1:
        sampler = sampler_of(params, prompt)
        for _ in range(draws):
            counts[sampler(logits)] += 1
    else:  # what was drawn would be penalized in the next draw
        for seed in range(draws):
            counts[sampler_of(replaced(params, seed=seed), prompt)(logits)] += 1
    return counts / draws


def replaced(params: SamplingParams, **changes: Any) -> SamplingParams:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return SamplingParams(**({name: getattr(params, name) for name in names} | changes))


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 1.7, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.0, "top_p": 0.05},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.8, "min_p": 1.0},
    {"temperature": 1.3, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 1.0, "top_p": 0.7, "min_p": 0.2},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 500},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.5},
    {"temperature": 1.0, "repetition_penalty": 0.5},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_follow_the_distribution_of_transformers(settings: dict[str, Any]) -> None:
    logits, params, prompt = random_logits(100, seed=1), SamplingParams(**settings, seed=3), [3, 50, 3, 99]
    expected = by_transformers(logits, params, prompt)
    draws = 20_000 if params.repetition_penalty == 1 else 4_000
    found = drawn_frequencies(logits, params, prompt, draws)
    assert not found[expected == 0].any()
    # Five standard deviations for each token, one draw for those that are hardly ever drawn.
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / draws) + 1 / draws).all()


@pytest.mark.parametrize("spread", [0.3, 3.0, 12.0])
@pytest.mark.parametrize("settings", [s for s in SETTINGS if len(s) > 1 and "repetition_penalty" not in s], ids=str)
def test_over_a_whole_vocabulary_nothing_is_drawn_that_transformers_excludes(
    settings: dict[str, Any], spread: float
) -> None:
    logits, params = random_logits(49152, seed=2, spread=spread), SamplingParams(**settings, seed=4)
    expected = by_transformers(logits, params, [])
    sampler = make_sampler(params)
    drawn = np.array([sampler(logits) for _ in range(300)])
    assert (expected[drawn] > 0).all()
    # The likelier tokens, with about three quarters of the probability, are drawn as often as they should be.
    order = np.argsort(-expected)
    likelier = order[: np.searchsorted(np.cumsum(expected[order]), 0.75) + 1]
    assert abs(np.isin(drawn, likelier).mean() - expected[likelier].sum()) < 0.125  # five standard deviations


def test_the_nucleus_holds_the_token_that_reaches_p() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    for top_p, allowed in ((0.4, {0}), (0.6, {0, 1}), (0.85, {0, 1, 2}), (0.99, {0, 1, 2, 3})):
        sampler = make_sampler(SamplingParams(temperature=1.0, top_p=top_p, seed=0))
        assert {sampler(logits) for _ in range(400)} == allowed


@pytest.mark.parametrize("size", [1, 7, 100, 5000, 49152, 32002])
def test_candidates_are_the_k_greatest_and_their_equals(size: int) -> None:
    rng = np.random.default_rng(size)
    for values in (rng.standard_normal(size), rng.integers(0, 9, size), np.zeros(size), np.sort(rng.random(size))):
        logits = values.astype(np.float32)
        for k in {1, min(5, size), min(50, size), size // 2 or 1, size, size + 1}:
            least = np.sort(logits)[::-1][min(k, size) - 1]
            assert np.array_equal(top_candidates(logits, k), np.flatnonzero(logits >= least))


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    assert make_sampler(SamplingParams())(np.array([1, 5, 5, -3], np.float32)) == 1
    for temperature in (1e-6, 1e-30, 1e-300):
        assert make_sampler(SamplingParams(temperature=temperature))(random_logits(1000, 5)) == int(
            random_logits(1000, 5).argmax()
        )


def test_the_penalty_counts_what_was_chosen_and_each_token_once() -> None:
    logits = np.array([4.0, 3.0, 2.5, -1.0], np.float32)
    sampler = sampler_of(SamplingParams(repetition_penalty=1.5), [3, 3])
    assert [sampler(logits) for _ in range(5)] == [0, 1, 0, 0, 0]  # 4 / 1.5 is more than 2.5, 3 / 1.5 is less
    assert [sampler_of(SamplingParams(repetition_penalty=1.5), [0, 1, 0])(logits) for _ in range(2)] == [0, 0]
    assert sampler_of(SamplingParams(repetition_penalty=1.5), [])(-logits) == 3


def test_greedy_with_a_penalty_agrees_with_transformers_step_by_step() -> None:
    history, sampler = [5, 9, 5], sampler_of(SamplingParams(repetition_penalty=1.3), [5, 9, 5])
    processor = RepetitionPenaltyLogitsProcessor(1.3)
    for step in range(200):
        logits = random_logits(300, seed=step % 3)
        scores = processor(torch.tensor([history]), torch.from_numpy(logits)[None])
        assert sampler(logits) == int(scores[0].argmax())
        history.append(int(scores[0].argmax()))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_logits_are_left_as_they_were(settings: dict[str, Any]) -> None:
    logits = random_logits(500, seed=6)
    logits.setflags(write=False)
    sampler_of(SamplingParams(**settings), [1, 2])(logits)
    assert np.array_equal(logits, random_logits(500, seed=6))


def test_a_seed_gives_the_same_tokens_again_and_another_seed_others() -> None:
    def run(seed: int | None) -> list[int]:
        sampler = make_sampler(SamplingParams(temperature=1.0, top_p=0.95, seed=seed))
        return [sampler(random_logits(1000, step)) for step in range(30)]

    assert run(7) == run(7)
    assert run(7) != run(8)
    assert run(None) != run(None)


def test_samplers_share_no_state() -> None:
    logits = random_logits(1000, 8)
    alone = make_sampler(SamplingParams(temperature=1.0, seed=1))
    expected = [alone(logits) for _ in range(10)]
    first, second = (make_sampler(SamplingParams(temperature=1.0, seed=seed)) for seed in (1, 2))
    assert [(first(logits), second(logits))[0] for _ in range(10)] == expected


def test_masked_tokens_are_never_drawn() -> None:
    logits = np.full(1000, -np.inf, np.float32)
    logits[[3, 500]] = 1.0
    for settings in SETTINGS:
        sampler = make_sampler(SamplingParams(**settings))
        assert {sampler(logits) for _ in range(60)} <= {3, 500}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_are_reported(temperature: float, bad: float) -> None:
    logits = np.full(10, bad, np.float32) if bad < 0 else random_logits(10, 9)
    logits[4] = bad
    with pytest.raises(BackendError, match=r"greatest logit is -?(nan|inf)"):
        make_sampler(SamplingParams(temperature=temperature))(logits)


def test_logprobs_are_those_of_a_float64_log_softmax() -> None:
    for spread in (0.1, 5.0, 200.0):
        logits = random_logits(49152, seed=10, spread=spread) + np.float32(1000)
        expected = torch.log_softmax(torch.from_numpy(logits.astype(np.float64)), dim=-1).numpy()
        found = logprobs(logits, 77, 5)
        likeliest = np.argsort(-expected, kind="stable")[:5]
        assert found.token == 77
        assert found.logprob == pytest.approx(expected[77], abs=1e-6)
        assert [token for token, _ in found.top] == likeliest.tolist()
        assert [value for _, value in found.top] == pytest.approx(expected[likeliest], abs=1e-6)


def test_logprobs_without_alternatives_and_with_all() -> None:
    logits = random_logits(10, 11)
    assert logprobs(logits, 2, 0).top == ()
    everything = logprobs(logits, 2, 50).top
    assert len(everything) == 10
    assert sum(math.exp(value) for _, value in everything) == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, math.nan, math.inf, "1", None, True, [1], 10**400, -(10**400), 10**5000]),
        ("top_k", [-2, 1.5, "5", None, True]),
        ("top_p", [0, -0.5, 1.01, math.nan, "x", None]),
        ("min_p", [-0.1, 1.1, math.nan, None]),
        ("repetition_penalty", [0, -1, math.nan, math.inf, None, 1e-46, 1e39]),
        ("seed", [-2, 1.0, "7", True, -(10**5000)]),
        ("max_tokens", [-1, 1.5, None, True]),
        ("stop", ["END", [""], ("",), (3,), None]),
        ("stop_token_ids", [5, (-1,), ("5",), (1.0,), None]),
        ("presence_penalty", [2.01, -2.01, math.nan, "1", None, True]),
        ("frequency_penalty", [2.01, -2.01, math.inf, None]),
        (
            "logit_bias",
            ["5", 5, None, {"5": 1}, {5: 100.1}, {5: -101}, {5: math.nan}, {-1: 1}, {True: 1}, [5], [(5, 1)] * 2],
        ),
        ("bad_words", ["word", [""], (3,), None, ["a"] * 1025, ["a" * 1025]]),
        ("min_tokens", [-1, 1.5, "1", None, True, 257]),
        ("ignore_eos", [1, None, "yes"]),
        ("logprobs", [-1, 2.5, True]),
        ("prompt_logprobs", [-1, 1.5, True, "2"]),
    ],
)
def test_impossible_values_are_refused_by_name(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(SamplingError, match=name) as caught:
            SamplingParams(**{name: value})
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_greatest_and_the_least_penalty_leave_numbers(penalty: float) -> None:
    logits = np.array([1e4, -1e4, 3, 2], np.float32)
    assert sampler_of(SamplingParams(repetition_penalty=penalty), [0, 1, 2])(logits) in range(4)


def test_the_limits_themselves_are_allowed() -> None:
    numpy_numbers: dict[str, Any] = {"temperature": np.float32(0.5), "top_k": np.int64(3)}
    params = SamplingParams(**numpy_numbers, top_p=1, min_p=1, seed=0, max_tokens=1, logprobs=0)
    assert params.top_k == 3
    assert SamplingParams().temperature == 0


def test_minus_one_is_another_word_for_off() -> None:
    assert SamplingParams(top_k=-1, seed=-1) == SamplingParams()
    assert SamplingParams(logit_bias={7: 2, 3: -1}).logit_bias == ((7, 2.0), (3, -1.0))
    assert SamplingParams(logit_bias=[[7, 2]]).logit_bias == ((7, 2.0),)
