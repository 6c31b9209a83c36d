"""Text becomes the ids of the checkpoint's tokenizer, and no id that the model does not know."""

import json
import random
import threading
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from text_fixtures import (
    HARMLESS,
    MODELS,
    SMOLLM2,
    STARLING,
    VOCAB_SIZES,
    bundle_folder,
    load,
    prefix_at_start_only,
    random_text,
    raw,
    tokenizer,
    tokenizer_json,
    with_tokens,
    without_added_token,
)

from starling.engine.errors import BundleError, PromptError
from starling.engine.text.tokenizer import Tokenizer

CARD_SINGLE = [1, 420, 6316, 28781, 3198, 3123, 1247, 28747, 22557, 32000, 420, 6316, 28781, 3198, 3123, 21631, 28747]
CARD_CODING = [1, 7596, 1247, 28747, 26256, 2936, 7653, 1413, 334, 1680, 32000, 7596, 21631, 28747]


def test_starling_prompts_written_out_have_the_ids_of_the_model_card() -> None:
    encode = tokenizer(STARLING).encode
    assert encode("GPT4 Correct User: Hello<|end_of_turn|>GPT4 Correct Assistant:") == CARD_SINGLE
    assert encode("Code User: Implement quicksort using C++<|end_of_turn|>Code Assistant:") == CARD_CODING


def test_smollm2_splits_digits() -> None:
    text = "        0: no debugging output (default)"
    assert tokenizer(SMOLLM2).encode(text) == [353, 32, 42, 787, 33665, 3124, 365, 6518, 25]


@pytest.mark.parametrize("model", MODELS)
def test_ids_are_those_of_the_tokenizers_library(model: str) -> None:
    rng = random.Random(1)
    for _ in range(100):
        text = random_text(rng)
        for special in (True, False):
            expected = raw(model).encode(text, add_special_tokens=special).ids
            assert tokenizer(model).encode(text, add_special_tokens=special) == expected


@pytest.mark.parametrize("model", MODELS)
def test_other_threads_run_while_a_long_text_is_encoded(model: str) -> None:
    text, turns, ended = "hello world " * 40_000, 0, threading.Event()
    tokenizer(model).encode("a warm start")

    def encode() -> None:
        for allow_special in (True, False):
            tokenizer(model).encode(text + "<|im_end|></s>", allow_special=allow_special)
        ended.set()

    thread = threading.Thread(target=encode)
    thread.start()
    # Two calls of the library that held Python's lock all the while would leave a turn before, between and after them.
    while not ended.wait(0.001):
        turns += 1
    thread.join()
    assert turns > 5


@pytest.mark.parametrize("model", MODELS)
def test_no_text_has_fewer_tokens_than_its_length_says(model: str) -> None:
    known = tokenizer(model)
    vocabulary = [known.decode([token_id]) for token_id in range(0, VOCAB_SIZES[model], 7)]
    for text in (*vocabulary, *HARMLESS, " " * 999, "\n" * 999, "=" * 999, "a" * 999):
        known.check_fits(len(text), max(1, len(known.encode(text))))
    with pytest.raises(PromptError, match="more than 3 tokens can hold") as caught:
        known.check_fits(3 * known.longest_token + 1, 3)
    assert caught.value.code == "context_length_exceeded"


def test_bos_is_added_where_the_checkpoint_adds_it() -> None:
    assert tokenizer(STARLING).encode("Hi")[0] == 1
    assert tokenizer(STARLING).encode("Hi", add_special_tokens=False) == tokenizer(STARLING).encode("Hi")[1:]
    assert tokenizer(SMOLLM2).encode("Hi", add_special_tokens=False) == tokenizer(SMOLLM2).encode("Hi")


@pytest.mark.parametrize("change", [str, prefix_at_start_only], ids=["legacy", "prefix at the start only"])
def test_a_disallowed_special_token_is_cut_up_as_if_it_were_not_one(change: Callable[[str], str]) -> None:
    document = change(tokenizer_json(STARLING))
    ignorant = load(without_added_token(document, "<|pad_0|>"))
    knowing = load(document)
    for text in ("<|pad_0|>", "a<|pad_0|>b", "a <|pad_0|> b<|pad_0|><|pad_0|>\n"):
        assert knowing.encode(text, allow_special=False) == ignorant.encode(text)
        assert 32001 in knowing.encode(text)


@pytest.mark.parametrize("model", MODELS)
def test_no_special_token_can_be_smuggled_into_plain_text(model: str) -> None:
    subject = tokenizer(model)
    for token_id in subject.special_ids:
        text = f"x{subject.id_to_token(token_id)}y {subject.id_to_token(token_id)}"
        assert subject.special_ids.isdisjoint(subject.encode(text, allow_special=False, add_special_tokens=False))
        assert subject.decode(subject.encode(text, allow_special=False)) == text


def test_ordinary_added_tokens_stay_tokens_in_plain_text() -> None:
    subject = load(with_tokens(tokenizer_json(SMOLLM2), [{"content": "    ", "special": False}]))
    assert subject.encode("<|im_end|>    x", allow_special=False).count(49152) == 1


def test_threads_that_allow_and_forbid_special_tokens_do_not_disturb_each_other() -> None:
    subject = load(tokenizer_json(SMOLLM2))
    text = "a<|im_end|>b" * 50
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(lambda i: subject.encode(text, allow_special=i % 2 == 0), range(200)))
    assert {row.count(2) for row in ids[::2]} == {50}
    assert {row.count(2) for row in ids[1::2]} == {0}


def test_special_tokens_are_known_by_role_but_only_if_they_have_an_id() -> None:
    special = tokenizer(STARLING).special_tokens
    assert special["eos_token"] == "<|end_of_turn|>"
    assert tokenizer(STARLING).token_to_id(special["bos_token"]) == 1
    assert "sep_token" not in special  # the published map names <sep>, which the model has no row for


def test_roles_are_read_from_either_file_and_in_both_spellings(tmp_path: Path) -> None:
    folder = bundle_folder(tmp_path, tokenizer_json(STARLING), {"eos_token": {"content": "</s>"}, "pad_token": None})
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<unk>", "bos_token": {"content": "<s>"}}')
    assert Tokenizer.load(folder, 32002).special_tokens == {"eos_token": "</s>", "bos_token": "<s>"}


@pytest.mark.parametrize("special", [True, False])
def test_a_token_beyond_the_vocabulary_is_refused_by_name(special: bool) -> None:
    document = with_tokens(tokenizer_json(STARLING), [{"content": "<sep>", "special": special}])
    with pytest.raises(BundleError, match=r"'<sep>' with id 32002.*below 32002"):
        load(document, vocab_size=32002)


def test_a_plain_token_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(BundleError, match="id 49151"):
        load(tokenizer_json(SMOLLM2), vocab_size=49151)


def test_an_id_that_no_memory_holds_is_refused_at_no_cost(tmp_path: Path) -> None:
    document = json.loads(tokenizer_json(SMOLLM2))
    document["model"]["vocab"]["\u0120the"] = 10**9
    folder = bundle_folder(tmp_path, json.dumps(document))
    tracemalloc.start()
    with pytest.raises(BundleError, match="with id 1000000000, but the model knows ids below 49152"):
        Tokenizer.load(folder, VOCAB_SIZES[SMOLLM2])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e9  # a place for each id takes 8 times that


def test_an_id_that_only_the_post_processor_adds_is_refused() -> None:
    document = json.loads(tokenizer_json(STARLING))
    document["post_processor"]["special_tokens"]["<s>"]["ids"] = [32005]
    with pytest.raises(BundleError, match="id 32005"):
        load(json.dumps(document), vocab_size=32002)


def test_a_missing_truncated_or_foreign_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"tokenizer\.json is missing"):
        Tokenizer.load(tmp_path, 32002)
    for content in (tokenizer_json(STARLING)[:1000], "{}", "\x00"):
        with pytest.raises(BundleError, match=r"is not a tokenizer\.json") as caught:
            Tokenizer.load(bundle_folder(tmp_path, content), 32002)
        assert "\n" not in str(caught.value)
    bundle_folder(tmp_path, tokenizer_json(STARLING))
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(BundleError, match=r"tokenizer_config\.json is not a JSON object"):
        Tokenizer.load(tmp_path, 32002)


def test_settings_for_training_do_not_cut_a_prompt() -> None:
    document = json.loads(tokenizer_json(SMOLLM2))
    document["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    assert len(load(json.dumps(document)).encode("one two three four five six")) == 6


def test_text_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(PromptError, match="UTF-8"):
        tokenizer(STARLING).encode("caf\udce9")


@pytest.mark.parametrize("model", MODELS)
def test_decoding_leaves_special_tokens_out_and_gives_the_text_back(model: str) -> None:
    subject, text = tokenizer(model), "Wie geht's? 日本語 😀\n  Zwei Zeilen."
    ids = subject.encode(text)
    eos = subject.token_to_id(subject.special_tokens["eos_token"])
    assert eos is not None
    assert subject.decode([*ids, eos]) == text
    assert max(ids) < VOCAB_SIZES[model]
