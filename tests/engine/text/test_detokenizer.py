"""Streamed text is the text decoded at once: no half characters, no lost or added spaces."""

import json
import random
import time
from collections.abc import Sequence

import pytest
from text_fixtures import HARMLESS, MODELS, SMOLLM2, STARLING, VOCAB_SIZES, load, random_text, tokenizer, tokenizer_json
from text_fixtures import with_tokens as with_added

from starling.engine.text.tokenizer import Tokenizer


def streamed(subject: Tokenizer, ids: Sequence[int], prompt_ids: Sequence[int] = ()) -> list[str]:
    detokenizer = subject.detokenizer(prompt_ids)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@pytest.mark.parametrize("model", MODELS)
def test_streams_of_random_ids_join_to_the_whole_decode(model: str) -> None:
    subject, rng = tokenizer(model), random.Random(2)
    for _ in range(400):
        # Low ids are special tokens and bytes, in both vocabularies.
        ids = [rng.randrange(rng.choice([300, VOCAB_SIZES[model]])) for _ in range(rng.randint(0, 40))]
        assert "".join(streamed(subject, ids)) == subject.decode(ids)


@pytest.mark.parametrize("model", MODELS)
def test_every_single_token_decodes_as_in_the_library(model: str) -> None:
    subject = tokenizer(model)
    for token_id in range(VOCAB_SIZES[model]):
        assert "".join(streamed(subject, [token_id])) == subject.decode([token_id])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("text", HARMLESS)
def test_no_piece_ends_within_a_character(model: str, text: str) -> None:
    subject = tokenizer(model)
    pieces = streamed(subject, subject.encode(text, add_special_tokens=False))
    assert "".join(pieces) == subject.decode(subject.encode(text))
    assert "�" in text or not any("�" in piece for piece in pieces)


@pytest.mark.parametrize("model", MODELS)
def test_a_continuation_keeps_the_space_that_parts_it_from_the_prompt(model: str) -> None:
    subject = tokenizer(model)
    prompt = subject.encode("The capital of France is")
    answer = subject.encode("The capital of France is Paris, of course")[len(prompt) :]
    assert "".join(streamed(subject, answer, prompt)) == " Paris, of course"


def test_an_answer_in_a_chat_begins_without_the_word_start() -> None:
    subject = tokenizer(STARLING)
    ids = subject.encode("Hello there", add_special_tokens=False)
    assert "".join(streamed(subject, ids)) == "Hello there"
    assert "".join(streamed(subject, ids, prompt_ids=[1])) == "Hello there"  # after BOS alone nothing was said


def test_special_tokens_at_the_end_of_a_prompt_do_not_hide_its_words() -> None:
    subject = tokenizer(STARLING)
    ids = subject.encode("there", add_special_tokens=False)
    assert "".join(streamed(subject, ids, [*subject.encode("Hello"), *[32000] * 100])) == " there"


@pytest.mark.parametrize("model", MODELS)
def test_prompt_and_continuation_join_to_the_whole_at_every_cut(model: str) -> None:
    subject, rng = tokenizer(model), random.Random(3)
    for _ in range(20):
        ids = subject.encode(random_text(rng, [text for text in HARMLESS if "�" not in text]))
        for cut in range(1, len(ids)):
            prompt = subject.decode(ids[:cut])
            if not prompt.endswith("�"):
                assert prompt + "".join(streamed(subject, ids[cut:], ids[:cut])) == subject.decode(ids)


@pytest.mark.parametrize("model", MODELS)
def test_a_character_that_the_prompt_left_incomplete_is_completed(model: str) -> None:
    subject = tokenizer(model)
    first, second = "\U0001d518", "\U0001d52b"  # four bytes, and as many tokens, each
    ids = subject.encode(f"x{first}{second} y")
    prompts = [ids[:cut] for cut in range(len(ids)) if subject.decode(ids[:cut]).endswith("�")]
    assert len(prompts) >= 4
    shown = {"".join(streamed(subject, ids[len(prompt) :], prompt)) for prompt in prompts}
    assert shown == {f"{first}{second} y", f"{second} y"}


@pytest.mark.parametrize("model", MODELS)
def test_an_emoji_in_the_prompt_is_not_said_again(model: str) -> None:
    subject = tokenizer(model)
    prompt = subject.encode("A llama: 🦙")
    assert "".join(streamed(subject, subject.encode("🦙", add_special_tokens=False)[-4:], prompt)).strip() == "🦙"


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\xe2\x82", b"\xe2\x82\xac\xff", b"\xf0\x9f\xff\x98\x80", b"\xc3"])
def test_bytes_that_never_become_a_character_show_as_the_library_shows_them(data: bytes) -> None:
    subject = tokenizer(STARLING)
    first = subject.token_to_id("<0x00>")
    assert first is not None
    word = subject.encode("ok", add_special_tokens=False)
    for ids in ([first + byte for byte in data], [*word, *(first + byte for byte in data), *word]):
        assert "".join(streamed(subject, ids)) == subject.decode(ids)
        assert "�" in subject.decode(ids)


def test_an_endless_run_of_invalid_bytes_is_shown_and_costs_no_more_per_token() -> None:
    subject = tokenizer(SMOLLM2)
    invalid = next(token_id for token_id in range(300) if subject.decode([token_id]) == "�")
    detokenizer = subject.detokenizer()
    shown = "".join(detokenizer.push(invalid) for _ in range(5000))
    assert shown + detokenizer.flush() == "�" * 5000
    assert len(shown) >= 4996


@pytest.mark.parametrize("model", MODELS)
def test_the_cost_per_token_does_not_grow_with_the_text(model: str) -> None:
    subject = tokenizer(model)
    detokenizer = subject.detokenizer()
    ids = subject.encode("A sentence of some length, 😀 with more. ") * 500
    start = time.perf_counter()
    for token_id in ids:
        detokenizer.push(token_id)
    # Decoding all text again for every token would take a hundred times as long.
    assert (time.perf_counter() - start) / len(ids) < 100e-6


def test_ordinary_added_tokens_are_shown() -> None:
    for model in MODELS:
        subject = load(with_added(tokenizer_json(model), [{"content": "<think é>", "special": False}]))
        ids = subject.encode("a <think é> b", add_special_tokens=False)
        assert VOCAB_SIZES[model] in ids
        assert "".join(streamed(subject, ids)) == subject.decode(ids)


@pytest.mark.parametrize(
    "decoder",
    [
        {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
        {"type": "Sequence", "decoders": [{"type": "Fuse"}]},
        {"type": "WordPiece", "prefix": "##", "cleanup": False},
        None,
    ],
)
def test_other_decoders_stream_to_the_whole_decode_too(decoder: object) -> None:
    subject = load(json.dumps(json.loads(tokenizer_json(STARLING)) | {"decoder": decoder}))
    rng = random.Random(4)
    for _ in range(50):
        ids = [rng.randrange(300, 32002) for _ in range(30)]
        assert "".join(streamed(subject, ids)) == subject.decode(ids)


@pytest.mark.parametrize("model", MODELS)
def test_special_tokens_are_shown_where_they_are_asked_for(model: str) -> None:
    subject = load(with_added(tokenizer_json(model), [{"content": "[TOOL_CALLS]"}, {"content": "[OTHER]"}]))
    ids = subject.encode("Well [TOOL_CALLS] [OTHER]naïve", add_special_tokens=False)
    detokenizer = subject.detokenizer(ids[:1], ("[TOOL_CALLS]", "unknown", "Well"))
    shown = "".join(map(detokenizer.push, ids)) + detokenizer.flush()
    assert "[TOOL_CALLS]" in shown
    assert shown.replace("[TOOL_CALLS]", "") == "".join(streamed(subject, ids, ids[:1]))
    assert "[OTHER]" not in shown
