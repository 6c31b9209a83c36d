"""Grammars: every answer that is drawn under one is one of its texts, whatever the logits and the tokenizer are."""

import contextlib
import json
import re
import time
from collections.abc import Callable
from typing import Any

import jsonschema
import numpy as np
import pytest
from json_schemas import JSON_SCHEMAS
from text_fixtures import MODELS, ROLES, SMOLLM2, STARLING, VOCAB_SIZES, load, tokenizer, tokenizer_json

from starling.engine.errors import SamplingError
from starling.engine.text.grammar import MOST_CHARACTERS, GrammarSpec
from starling.engine.text.grammar_compiler import MOST_KEPT, MOST_KEPT_CHARACTERS, Grammars
from starling.engine.text.grammar_state import GrammarState

END = {STARLING: 32000, SMOLLM2: 2}
GRAMMARS = {model: Grammars(tokenizer(model), [END[model]], VOCAB_SIZES[model]) for model in MODELS}
ORIGIN = 'start: NAME " from " NAME\nNAME: /[A-Z][a-z]{2,6}/'
GBNF = 'root ::= "yes" | "no" | "maybe" [0-9]+ "%"'


def allowed(state: GrammarState, vocab_size: int) -> set[int]:
    logits = np.zeros(vocab_size, np.float32)
    state(logits)
    return set(np.flatnonzero(np.isfinite(logits)).tolist())


def drawn(model: str, spec: GrammarSpec, seed: int = 0, *, reply: bool = False, most: int = 400) -> str:
    """The text of an answer drawn from random logits, in which what ends strings and lists is a little likelier."""
    subject, rng = tokenizer(model), np.random.default_rng(seed)
    likely = [
        i
        for i, text in enumerate(subject.token_bytes())
        if text in (b'"', b'",', b"]", b'"]', b'"}', b"}", b"@", b".com")
    ]
    likely.append(END[model])
    state = GRAMMARS[model].start(spec, after_space=reply and subject.strips_first_space)
    detokenizer = subject.detokenizer(() if reply else subject.encode("Answer:"))
    text = ""
    for _ in range(most):
        logits = rng.standard_normal(VOCAB_SIZES[model]).astype(np.float32)
        logits[likely] += 3
        state(logits)
        token = int(logits.argmax())
        assert np.isfinite(logits[token])
        if token == END[model]:
            break
        state.accept(token)
        text += detokenizer.push(token)
        if state.complete:
            break
    else:
        pytest.fail(f"no end within {most} tokens: {text!r}")
    return text + detokenizer.flush()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", list(JSON_SCHEMAS)[::5] + list(JSON_SCHEMAS)[3::15])
def test_documents_of_a_schema_are_valid(model: str, name: str) -> None:
    schema = JSON_SCHEMAS[name]
    document = json.loads(drawn(model, GrammarSpec.json_schema(schema)))
    jsonschema.validate(document, schema)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("reply", [False, True])
@pytest.mark.parametrize(
    "spec",
    [
        GrammarSpec.choice(["yes", "no"]),
        GrammarSpec.choice([" a", "a  b", 'say "no"\\', "line\nend", "naïve 日本", "[/regex].*"]),
        GrammarSpec.regex(r"[A-Z]{2}-\d{3}/(é|日本)?"),
        GrammarSpec.regex(" {2}x"),
        GrammarSpec.lark(ORIGIN),
        GrammarSpec.lark(GBNF),
        GrammarSpec.json_object(),
        GrammarSpec.json_schema(True),
    ],
    ids=lambda value: value.text[:12] or value.kind if isinstance(value, GrammarSpec) else str(value),
)
def test_answers_are_texts_of_their_grammar(model: str, reply: bool, spec: GrammarSpec) -> None:
    """A reply too, whose first space is no part of its text where the vocabulary is SentencePiece's."""
    patterns = {ORIGIN: "[A-Z][a-z]{2,6} from [A-Z][a-z]{2,6}", GBNF: r"yes|no|maybe[0-9]+%"}
    for seed in range(6):
        text = drawn(model, spec, seed, reply=reply)
        if spec.kind == "choice":
            assert text in json.loads(spec.text)
        elif spec.kind == "json_object":
            assert isinstance(json.loads(text), dict)
        elif spec.kind == "json_schema":
            json.loads(text)
        else:
            assert re.fullmatch(patterns.get(spec.text, spec.text), text)


@pytest.mark.parametrize("model", MODELS)
def test_special_tokens_are_no_text(model: str) -> None:
    subject = tokenizer(model)
    end = subject.special_tokens["eos_token"]
    state = GRAMMARS[model].start(GrammarSpec.choice([f"{end}{end}"]))
    plain = subject.encode_continuation(end + end)
    assert not set(plain) & subject.special_ids
    for token in plain:
        may_come = allowed(state, VOCAB_SIZES[model])
        assert token in may_come
        assert not may_come & subject.special_ids
        state.accept(token)
    assert state.complete


@pytest.mark.parametrize("model", MODELS)
def test_end_tokens_come_where_the_grammar_is_complete(model: str) -> None:
    subject, grammars = tokenizer(model), GRAMMARS[model]
    [one], stop = subject.encode_continuation("1")[-1:], subject.encode_continuation("x")[-1]
    spec = GrammarSpec.regex("1{2,}x?")
    state = grammars.start(spec, end_ids=[stop])
    for ones in range(4):
        ends = {END[model], stop}
        assert allowed(state, VOCAB_SIZES[model]) & ends == (ends if ones >= 2 else set())
        state.accept(one)
    assert not state.complete
    # An answer that goes on after end tokens has none of them, and is over where nothing else can follow.
    state = grammars.start(spec, ends=False)
    for _ in range(3):
        state.accept(one)
    assert END[model] not in allowed(state, VOCAB_SIZES[model])
    assert not state.complete
    state.accept(stop)
    assert state.complete


@pytest.mark.parametrize("model", MODELS)
def test_what_must_come_is_the_draft_and_in_the_tokenizer_s_own_tokens(model: str) -> None:
    subject = tokenizer(model)
    schema = {"type": "object", "properties": {"temperature": {"const": "warm enough"}}, "required": ["temperature"]}
    state = GRAMMARS[model].start(GrammarSpec.json_schema(schema | {"additionalProperties": False}))
    whole = subject.encode_continuation('{"temperature": "warm enough"}')
    assert state.draft([], 3) == (whole[:3], True)
    taken: list[int] = []
    while not state.complete:
        forced, _ = state.draft([END[model]], 50)
        assert forced == whole[len(taken) : len(taken) + len(forced)]
        token = forced[0] if forced else whole[len(taken)]
        assert token in allowed(state, VOCAB_SIZES[model])
        state.accept(token)
        taken.append(token)
    assert taken == whole


def test_a_draft_from_elsewhere_goes_as_far_as_the_grammar() -> None:
    subject = tokenizer(SMOLLM2)
    state = GRAMMARS[SMOLLM2].start(GrammarSpec.regex("[a-z ]+"))
    words = subject.encode_continuation("one two three")
    assert state.draft([*words, *subject.encode_continuation(", four")], 99) == (words, False)
    assert state.draft(words, 99) == (words, False), "looking ahead changes nothing"


def test_masks_are_the_same_from_the_thread() -> None:
    states = [GRAMMARS[SMOLLM2].start(GrammarSpec.json_object()) for _ in range(2)]
    for token in tokenizer(SMOLLM2).encode_continuation('{"a": [1, "b"]}'):
        states[0].begin_mask()
        assert allowed(states[0], VOCAB_SIZES[SMOLLM2]) == allowed(states[1], VOCAB_SIZES[SMOLLM2])
        for state in states:
            state.accept(token)
    assert states[0].complete


def test_a_tokenizer_that_normalizes_texts_writes_the_grammar_s_bytes() -> None:
    document = json.dumps(json.loads(tokenizer_json(SMOLLM2)) | {"normalizer": {"type": "NFC"}})
    subject = load(document, ROLES[SMOLLM2], VOCAB_SIZES[SMOLLM2])
    state = Grammars(subject, [2], VOCAB_SIZES[SMOLLM2]).start(GrammarSpec.choice(["cafe\u0301 au lait"]))
    text = b""
    while not state.complete:
        token = min(allowed(state, VOCAB_SIZES[SMOLLM2]))
        text += subject.token_bytes()[token]
        state.accept(token)
    assert text.decode() == "cafe\u0301 au lait"


def test_tokens_without_bytes_of_their_own_are_refused() -> None:
    document = json.dumps(
        json.loads(tokenizer_json(SMOLLM2)) | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}
    )
    grammars = Grammars(load(document, ROLES[SMOLLM2]), [2], VOCAB_SIZES[SMOLLM2])
    with pytest.raises(SamplingError, match="no bytes of their own"):
        grammars.start(GrammarSpec.json_object())


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: GrammarSpec.json_schema('{"type":'), "the JSON schema is not JSON: Expecting value"),
        (lambda: GrammarSpec.json_schema("[" * 100_000), "nested too deeply"),
        (lambda: GrammarSpec.json_schema("3"), "the JSON schema is 3: give an object"),
        (lambda: GrammarSpec.json_schema({"enum": [{1}]}), "is not JSON: Object of type set"),
        (lambda: GrammarSpec.json_schema({"const": float("nan")}), "is not JSON"),
        (lambda: GrammarSpec.json_schema({"const": "\ud800"}), "half a surrogate pair"),
        (
            lambda: GrammarSpec.json_schema({"items": [{"properties": {str(i): {} for i in range(2001)}}]}),
            "2,001 members",
        ),
        (lambda: GrammarSpec.regex(""), "the text of a regex is ''"),
        (
            lambda: GrammarSpec.regex("a" * (MOST_CHARACTERS + 1)),
            "the regex has 131,073 characters: give at most 131,072",
        ),
        (lambda: GrammarSpec.choice([]), "the choice holds no text"),
        (lambda: GrammarSpec.choice(["a", ""]), "the choice holds no text"),
        (lambda: GrammarSpec("xml", "a"), "the kind of grammar is 'xml': give one of json_schema"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_grammar_is_refused(make: Callable[[], GrammarSpec], problem: str) -> None:
    with pytest.raises(SamplingError, match=re.escape(problem)) as caught:
        make()
    assert caught.value.field == "grammar"


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        (GrammarSpec.json_schema({"type": "array", "uniqueItems": True}), 'Unimplemented keys: ["uniqueItems"]'),
        (GrammarSpec.json_schema({"not": {}}), 'Unimplemented keys: ["not"]'),
        (GrammarSpec.json_schema({"type": "string", "pattern": "(?=x)"}), "look-around"),
        (GrammarSpec.json_schema({"$ref": "https://example.org/x.json"}), "not present in a registry"),
        (GrammarSpec.json_schema({"type": "string", "minLength": 2, "maxLength": 1}), "minLength"),
        (GrammarSpec.regex("("), "unclosed group"),
        (GrammarSpec.lark("start: other"), "other"),
        (GrammarSpec.lark("root ::= ("), "Expected ')'"),
    ],
)
def test_what_cannot_be_held_to_is_refused(spec: GrammarSpec, problem: str) -> None:
    with pytest.raises(SamplingError, match="cannot be decoded under") as caught:
        GRAMMARS[SMOLLM2].start(spec)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"anyOf": [schema, {"type": "null"}]}
    return schema


def numbered(count: int, end: dict[str, Any]) -> dict[str, Any]:
    """Each of the definitions names the next one twice."""
    definitions = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": definitions | {f"d{count}": end}}


@pytest.mark.parametrize(
    "spec",
    [
        GrammarSpec.lark("start: " + "(" * 60_000 + '"a"' + ")" * 60_000),
        GrammarSpec.regex("(" * 20_000 + "a" + ")" * 20_000),
        GrammarSpec.regex("((a{1,1000}){1,1000}){1,1000}"),
        GrammarSpec.regex("(.*a.{30}b){3}"),
        GrammarSpec.lark('start: a\na: a a | "x" | ""'),
        GrammarSpec.lark("start: start"),
        GrammarSpec.lark("start: " + " | ".join(f'"{i}"' for i in range(12_000))),
        GrammarSpec.lark("root ::= " + "(" * 50_000),
        GrammarSpec.lark("\n" * 130_000),
        GrammarSpec.json_schema({"type": "string", "minLength": 10**6, "maxLength": 10**9}),
        GrammarSpec.json_schema({"type": "array", "minItems": 10**9, "items": {"type": "integer"}}),
        GrammarSpec.json_schema({"enum": [f"v{i}" for i in range(12_000)]}),
        GrammarSpec.json_schema({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2_000)}}),
        GrammarSpec.json_schema(nested(200)),
        GrammarSpec.json_schema(numbered(40, {"type": "string"})),
        GrammarSpec.json_schema(
            {"allOf": [{"anyOf": [{"properties": {f"a{i}{j}": {}}} for j in range(6)]} for i in range(9)]}
        ),
    ],
    ids=range(16),
)
def test_a_stranger_s_grammar_takes_bounded_time(spec: GrammarSpec) -> None:
    """It is refused, or can be drawn from; a token may be too much work, which ends that answer alone."""
    begin = time.perf_counter()
    rng = np.random.default_rng(0)
    with contextlib.suppress(SamplingError):
        state = GRAMMARS[SMOLLM2].start(spec)
        for _ in range(20):
            logits = rng.standard_normal(VOCAB_SIZES[SMOLLM2]).astype(np.float32)
            state(logits)
            state.accept(int(logits.argmax()))
            if state.complete:
                break
    assert time.perf_counter() - begin < 5


def test_compiled_grammars_are_kept_up_to_a_number() -> None:
    grammars = Grammars(tokenizer(STARLING), [END[STARLING]], VOCAB_SIZES[STARLING])
    for number in range(MOST_KEPT + 5):
        grammars.start(GrammarSpec.choice([str(number)]))
        grammars.start(GrammarSpec.choice([str(number)]))
        assert len(grammars) == min(number + 1, MOST_KEPT)
    for digit in "123456789":
        grammars.start(GrammarSpec.choice([digit * (MOST_CHARACTERS - 10)]))
    assert len(grammars) == MOST_KEPT_CHARACTERS // MOST_CHARACTERS
