"""Generation under a grammar: every answer is one of its texts, alone, in a batch, and with speculation."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from json_schemas import JSON_SCHEMAS

from starling.engine import Engine, GrammarSpec, SamplingParams
from starling.engine.errors import RequestFailed, SamplingError
from starling.engine.serving_loop import ServingLoop

PROMPT = "Answer with a document:"
POINT: dict[str, Any] = {
    "type": "object",
    "properties": {
        "longitude": {"type": "integer"},
        "latitude": {"type": "integer"},
        "name": {"enum": ["here", "there"]},
    },
    "required": ["longitude", "latitude", "name"],
    "additionalProperties": False,
}
#: Each ends within a few tokens, whatever the weights are.
SPECS = {
    "point": GrammarSpec.json_schema(POINT),
    "choice": GrammarSpec.choice(["yes", "no", "it depends"]),
    "regex": GrammarSpec.regex("[A-Z]{2}-[0-9]{3}"),
    "lark": GrammarSpec.lark('start: "<" /[a-z]{3}/ ">"'),
}


def is_text_of(name: str, text: str) -> bool:
    if name == "point":
        jsonschema.validate(json.loads(text), POINT)
        return True
    patterns = {"choice": "yes|no|it depends", "regex": "[A-Z]{2}-[0-9]{3}", "lark": "<[a-z]{3}>"}
    return re.fullmatch(patterns[name], text) is not None


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Iterator[Engine]:
    with Engine(tiny_bundle, backend="onnxruntime-cpu", max_seq=256, max_batch=4, threads=1) as engine:
        assert engine.backend.verified_rows > 0
        yield engine


@pytest.fixture(autouse=True)
def no_speculation(engine: Engine) -> None:
    engine.speculation = None


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("reply", [False, True])
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_an_answer_is_a_text_of_its_grammar(engine: Engine, name: str, reply: bool, temperature: float) -> None:
    for seed in range(4):
        result = engine.generate(
            PROMPT, reply=reply, grammar=SPECS[name], temperature=temperature, seed=seed, max_tokens=200
        )
        assert result.finish_reason == "stop"
        assert is_text_of(name, result.text), result.text


@pytest.mark.parametrize("name", list(JSON_SCHEMAS)[2::23])
def test_documents_of_random_weights_are_valid_or_cut_by_the_length(engine: Engine, name: str) -> None:
    grammar = GrammarSpec.json_schema(JSON_SCHEMAS[name])
    result = engine.generate(PROMPT, grammar=grammar, temperature=1, seed=1, max_tokens=200)
    if result.finish_reason == "stop":
        jsonschema.validate(json.loads(result.text), JSON_SCHEMAS[name])
    else:
        assert (result.finish_reason, len(result.tokens)) == ("length", 200)


@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(temperature=1, seed=5, top_p=0.9)], ids=["greedy", "drawn"]
)
@pytest.mark.parametrize("name", SPECS)
def test_speculation_changes_nothing_but_the_number_of_runs(engine: Engine, name: str, params: SamplingParams) -> None:
    params = replace(params, grammar=SPECS[name], max_tokens=200)
    plain = engine.generate(PROMPT, params)
    engine.speculation = "prompt-lookup"
    drafted = engine.generate(PROMPT, params)
    assert (drafted.tokens, drafted.text, drafted.finish_reason) == (plain.tokens, plain.text, plain.finish_reason)
    if name == "point":
        assert drafted.timings.accepted_tokens >= 6, "the names of the members are known before the model runs"


def test_rows_have_grammars_of_their_own(engine: Engine) -> None:
    with ServingLoop(engine) as loop:
        for speculation in (None, "prompt-lookup"):
            params = {name: SamplingParams(grammar=spec, temperature=1, seed=3) for name, spec in SPECS.items()}
            handles = {name: loop.submit(PROMPT, params[name]) for name in SPECS}
            free = loop.submit(PROMPT, SamplingParams(max_tokens=12, ignore_eos=True))
            texts = {name: handle.result().text for name, handle in handles.items()}
            assert all(is_text_of(name, text) for name, text in texts.items()), (speculation, texts)
            assert len(free.result().tokens) == 12
    alone = {name: engine.generate(PROMPT, params[name]).text for name in SPECS}
    assert texts == alone


def test_the_same_grammar_serves_several_rows_at_once(engine: Engine) -> None:
    results = engine.generate([PROMPT] * 4, grammar=SPECS["point"], temperature=1.5, max_tokens=200)
    assert all(is_text_of("point", result.text) for result in results)
    assert len({result.text for result in results}) > 1


def test_a_document_ends_where_it_is_complete_even_without_end_tokens(engine: Engine) -> None:
    result = engine.generate(PROMPT, grammar=SPECS["regex"], ignore_eos=True, max_tokens=50)
    assert (result.finish_reason, is_text_of("regex", result.text)) == ("stop", True)
    endless = engine.generate(PROMPT, grammar=GrammarSpec.regex("[a-c]+"), ignore_eos=True, max_tokens=20)
    assert (endless.finish_reason, len(endless.tokens)) == ("length", 20)
    assert re.fullmatch("[a-c]+", endless.text)
    exact = engine.generate(PROMPT, grammar=SPECS["regex"], max_tokens=len(result.tokens))
    assert (exact.text, exact.finish_reason) == (result.text, "stop"), "complete with the last token that it may have"


def test_the_length_may_cut_a_document_and_says_so(engine: Engine) -> None:
    whole = engine.generate(PROMPT, grammar=SPECS["point"], max_tokens=200)
    cut = engine.generate(PROMPT, grammar=SPECS["point"], max_tokens=5)
    assert (cut.tokens, cut.finish_reason) == (whole.tokens[:5], "length")


def test_a_stop_token_ends_only_a_complete_document(engine: Engine) -> None:
    [token] = engine.tokenizer.encode_continuation("b")
    grammar = GrammarSpec.regex("[ab]{4,}")
    for seed in range(8):
        result = engine.generate(
            PROMPT, grammar=grammar, stop_token_ids=(token,), temperature=2, seed=seed, max_tokens=60
        )
        assert len(result.text) >= 4


def test_log_probabilities_are_the_model_s_own(engine: Engine) -> None:
    free = engine.generate(PROMPT, max_tokens=1, logprobs=3)
    bound = engine.generate(PROMPT, max_tokens=1, logprobs=3, grammar=SPECS["choice"])
    assert free.logprobs is not None
    assert bound.logprobs is not None
    assert bound.logprobs[0].top == free.logprobs[0].top
    assert np.isfinite(bound.logprobs[0].logprob)


def test_nothing_left_to_choose_ends_that_request_alone(engine: Engine) -> None:
    with ServingLoop(engine) as loop:
        stuck = loop.submit(PROMPT, SamplingParams(grammar=GrammarSpec.choice([" x"]), bad_words=("x",)))
        other = loop.submit(PROMPT, SamplingParams(max_tokens=4, ignore_eos=True))
        with pytest.raises(RequestFailed, match="leaves no token to choose"):
            stuck.result()
        assert len(other.result().tokens) == 4


def test_a_grammar_that_cannot_be_decoded_under_is_refused_before_anything_runs(engine: Engine) -> None:
    with pytest.raises(SamplingError, match="cannot be decoded under: Unimplemented keys") as caught:
        engine.stream(PROMPT, grammar=GrammarSpec.json_schema({"not": {"type": "null"}}))
    assert caught.value.field == "grammar"
    with pytest.raises(SamplingError, match="grammar is 'yes': give a GrammarSpec") as caught:
        SamplingParams(grammar="yes")  # type: ignore[arg-type]
    assert caught.value.field == "grammar"


def test_a_chat_of_a_real_model_answers_in_its_grammar(demo_int8_bundle: Path) -> None:
    with Engine(demo_int8_bundle, max_seq=512) as engine:
        session = engine.chat()
        answers = []
        for question in ("Is Paris in France? Answer yes or no.", "Is Paris in Japan? Answer yes or no."):
            stream = session.stream(question, SamplingParams(grammar=GrammarSpec.choice(["Yes", "No"])))
            answers.append("".join(chunk.text for chunk in stream))
        assert set(answers) <= {"Yes", "No"}
