"""The benchmark of speculation: prompts of both kinds, tokens compared, gains as ratios."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from starling.engine import Engine
from starling.engine.batching.step_costs import ExtraCost
from starling.engine.generation.sampling_params import SamplingParams
from starling.profiling.load import served_speculation
from starling.profiling.load.speculation_gain import KINDS, Answer, measure, read_texts, report, summarize, tables


@pytest.fixture
def assumed_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What verifying costs stays what is assumed at first: how busy this machine is may not decide what is drafted."""
    monkeypatch.setattr(ExtraCost, "observe", lambda *_: None)


def test_there_are_ten_prompts_of_each_kind() -> None:
    texts = read_texts()
    assert [sum(text.kind == kind for text in texts) for kind in KINDS] == [10, 10]
    assert len({text.name for text in texts}) == 20


@pytest.mark.usefixtures("assumed_costs")
def test_answers_are_made_both_ways_and_compared(demo_bundle: Path) -> None:
    texts = [text for text in read_texts() if "list" in text.name or "sky" in text.name]
    params = SamplingParams(max_tokens=24)
    with Engine(demo_bundle, backend="onnxruntime-cpu", threads=1) as engine:
        answers = measure(engine, texts, params, rounds=2)
        document = json.loads(json.dumps(report(engine, params, 2, answers)))
    copied, free = answers
    assert (copied.kind, free.kind) == KINDS
    assert [answer.first_difference for answer in answers] == [None, None]
    assert copied.accepted_tokens > 12
    assert copied.gain == pytest.approx(copied.speed_with / copied.speed_without)
    assert [summary["identical"] for summary in document["summaries"]] == [1, 1]
    assert [answer["name"] for answer in document["answers"]] == [text.name for text in texts]
    assert [table.row_count for table in tables(document)] == [2, 2]


def test_a_summary_counts_identical_answers_and_takes_the_geometric_mean() -> None:
    answer = Answer("free", "one", 10, 24, None, 10, 4, 20.0, 40.0, 2.0, 1000.0, 500.0, 2.0)
    worse = replace(answer, first_difference=7, drafted_tokens=6, accepted_tokens=0, gain=0.5, latency_gain=0.5)
    [summary] = summarize([answer, worse])
    assert (summary.prompts, summary.identical, summary.acceptance) == (2, 1, 0.25)
    assert (summary.gain, summary.least_gain, summary.greatest_gain) == (1.0, 0.5, 2.0)


@pytest.mark.usefixtures("assumed_costs")
def test_served_streams_are_compared_both_ways(demo_bundle: Path) -> None:
    with Engine(demo_bundle, max_seq=1024, max_batch=4, speculation="prompt-lookup") as engine:
        gain = served_speculation.measure(engine, "repetitive", SamplingParams(max_tokens=24, ignore_eos=True), 1)
        assert gain.same_tokens
        assert gain.prompts == 10
        assert len(gain.tokens_per_second_with) == len(gain.tokens_per_second_without) == 1
        assert gain.drafted_tokens > 0 or engine.backend.verified_rows == 1
