"""Answers under the grammar of tools: calls of the functions that there are, in the form that the parser reads."""

import json

import jsonschema
import numpy as np
import pytest
from text_fixtures import ROLES, SMOLLM2, VOCAB_SIZES, load, tokenizer_json, with_tokens

from starling.engine.text.grammar_compiler import Grammars
from starling.engine.text.tool_formats import HERMES, LLAMA3, MISTRAL_LIST, MISTRAL_NAMED, ToolFormat
from starling.engine.text.tool_grammar import Function, call_grammar
from starling.engine.text.tool_parser import CallPiece, ToolParser

MARKS = ("[TOOL_CALLS]", "[ARGS]", "<|python_tag|>")
SIZE = VOCAB_SIZES[SMOLLM2] + len(MARKS)
SUBJECT = load(with_tokens(tokenizer_json(SMOLLM2), [{"content": mark} for mark in MARKS]), ROLES[SMOLLM2], SIZE)
GRAMMARS = Grammars(SUBJECT, [2], SIZE)
SPECIAL = SUBJECT.special_ids_by_text
ADD = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/digit"}, "b": {"enum": ["x", "}{"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
    "$defs": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}},
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
FUNCTIONS = (Function("add", ADD), Function("now", NOTHING))
FORMS = (HERMES, MISTRAL_LIST, MISTRAL_NAMED, LLAMA3)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("seed", range(3))
def test_required_calls_are_read_back(form: ToolFormat, seed: int) -> None:
    spec = call_grammar(form, FUNCTIONS, SPECIAL, must_call=True, parallel=False)
    state, rng = GRAMMARS.start(spec), np.random.default_rng(seed)
    detokenizer, text = SUBJECT.detokenizer((), MARKS), ""
    while not state.complete:
        logits = rng.standard_normal(SIZE).astype(np.float32)
        state(logits)
        token = int(logits.argmax())
        state.accept(token)
        text += detokenizer.push(token)
    parser = ToolParser(form, [function.name for function in FUNCTIONS])
    pieces = parser.push(text) + parser.flush()
    calls = [piece for piece in pieces if isinstance(piece, CallPiece)]
    assert calls == pieces, "nothing but the call"
    schema = {function.name: function.parameters for function in FUNCTIONS}[calls[0].name or ""]
    jsonschema.validate(json.loads("".join(piece.arguments for piece in calls)), schema)


@pytest.mark.parametrize("form", [HERMES, MISTRAL_LIST], ids=lambda form: form.name)
def test_text_is_free_until_a_mark_and_calls_after_it_are_not(form: ToolFormat) -> None:
    state = GRAMMARS.start(call_grammar(form, FUNCTIONS, SPECIAL, must_call=False, parallel=True))
    for token in SUBJECT.encode_continuation("Let me see. "):
        state.accept(token)
    logits = np.zeros(SIZE, np.float32)
    state(logits)
    assert np.isfinite(logits[2]), "text alone may end"
    mark = [SPECIAL[form.begin]] if form.begin in SPECIAL else SUBJECT.encode_continuation(form.begin)
    for token in mark:
        state.accept(token)
    forced, is_forced = state.draft([], 20)
    expected = '\n{"name": "' if form is HERMES else '[{"name": "'
    assert is_forced
    assert b"".join(SUBJECT.token_bytes()[token] for token in forced).decode().startswith(expected[:10])
