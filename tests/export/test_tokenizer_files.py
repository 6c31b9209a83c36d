"""The tokenizer of a folder reaches the bundle as it is, but for ids that the embedding does not have."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, MistralConfig

from starling.engine.errors import CheckpointError
from starling.export.checkpoints.checkpoint import TokenizerFiles
from starling.export.tokenizers.starling_tokenizer import mistral_model_file, openchat_template, starling_tokenizer_json
from starling.export.tokenizers.tokenizer_files import read_tokenizer_files

CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
SINGLE_TURN = "GPT4 Correct User: Hello<|end_of_turn|>GPT4 Correct Assistant:"
SINGLE_TURN_IDS = [
    1,
    420,
    6316,
    28781,
    3198,
    3123,
    1247,
    28747,
    22557,
    32000,
    420,
    6316,
    28781,
    3198,
    3123,
    21631,
    28747,
]


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with Starling's tokenizer.json and a tokenizer_config.json."""
    (tmp_path / "tokenizer.json").write_text(starling_tokenizer_json(), encoding="utf-8")
    write_json(tmp_path / "tokenizer_config.json", CONFIG)
    return tmp_path


def read(folder: Path, *, vocab_size: int = 32002, generation: dict[str, Any] | None = None) -> TokenizerFiles:
    config = MistralConfig(vocab_size=vocab_size, bos_token_id=1, eos_token_id=2)
    return read_tokenizer_files(folder, config, generation or {})


def add_token(folder: Path, text: str, index: int) -> None:
    document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    document["added_tokens"].append({**document["added_tokens"][-1], "id": index, "content": text})
    write_json(folder / "tokenizer.json", document)


def test_tokenizer_json_is_taken_as_it_is(folder: Path) -> None:
    files = read(folder)
    assert json.loads(files.tokenizer_json) == json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert (files.bos, files.notes) == (1, ())


def test_starlings_sep_token_is_dropped_with_a_note(folder: Path) -> None:
    add_token(folder, "<sep>", 32002)
    write_json(folder / "special_tokens_map.json", {"bos_token": "<s>", "sep_token": "<sep>"})
    write_json(folder / "tokenizer_config.json", CONFIG | {"sep_token": "<sep>", "added_tokens_decoder": {"32002": {}}})
    files = read(folder)
    assert files.notes[0] == "dropped <sep> (id 32002): outside the vocabulary of 32002"
    assert max(Tokenizer.from_str(files.tokenizer_json).get_vocab().values()) == 32001
    assert files.special_tokens_map == {"bos_token": "<s>"}
    assert files.tokenizer_config == CONFIG | {"added_tokens_decoder": {}}


def test_a_sep_token_that_only_the_special_tokens_map_names_is_dropped(folder: Path) -> None:
    write_json(folder / "special_tokens_map.json", {"bos_token": "<s>", "sep_token": "<sep>"})
    files = read(folder)
    assert files.notes == (
        "dropped <sep> (id 32002): outside the vocabulary of 32002",
        "dropped sep_token <sep>: it has no id in the vocabulary",
    )
    assert files.special_tokens_map == {"bos_token": "<s>"}


def test_a_token_outside_the_vocabulary_that_is_added_to_every_text_is_refused(folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    document["post_processor"]["special_tokens"]["<s>"]["ids"] = [32002]
    write_json(folder / "tokenizer.json", document)
    with pytest.raises(CheckpointError, match="its post_processor adds '<s>', outside the vocabulary of 32002"):
        read(folder)


def test_a_base_token_outside_the_vocabulary_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"token '梦' has id 31999, outside the vocabulary of 31999"):
        read(folder, vocab_size=31999)


@pytest.mark.parametrize(
    ("generation", "eos"),
    [({}, (2,)), ({"eos_token_id": 5}, (5,)), ({"eos_token_id": [5, 7]}, (5, 7)), ({"eos_token_id": 40000}, ())],
)
def test_eos_comes_from_generation_config_else_from_config(
    folder: Path, generation: dict[str, Any], eos: tuple[int, ...]
) -> None:
    assert read(folder, generation=generation).eos == eos


def test_a_chat_model_also_stops_at_its_end_of_turn(folder: Path) -> None:
    write_json(folder / "tokenizer_config.json", CONFIG | {"eos_token": {"content": "<|end_of_turn|>"}})
    assert read(folder).eos == (2,)
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    assert read(folder).eos == (2, 32000)


def test_templates_of_tokenizer_config_may_be_a_list(folder: Path) -> None:
    named = [{"name": "default", "template": "D"}, {"name": "rag", "template": "R"}]
    write_json(folder / "tokenizer_config.json", CONFIG | {"chat_template": named})
    files = read(folder)
    assert (files.chat_template, files.additional_chat_templates) == ("D", {"rag": "R"})
    assert "chat_template" not in files.tokenizer_config


def test_template_files_win_over_tokenizer_config(folder: Path) -> None:
    write_json(folder / "tokenizer_config.json", CONFIG | {"chat_template": "old"})
    (folder / "chat_template.jinja").write_text("new", encoding="utf-8")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("T", encoding="utf-8")
    files = read(folder)
    assert (files.chat_template, files.additional_chat_templates) == ("new", {"tool": "T"})


def test_a_template_of_the_openchat_kind_gains_code_and_math(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(openchat_template(), encoding="utf-8")
    assert read(folder).additional_chat_templates == {
        "code": openchat_template("code"),
        "math": openchat_template("math"),
    }


def test_another_template_gains_nothing(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    assert read(folder).additional_chat_templates == {}


def test_a_sentencepiece_model_alone_is_converted(tmp_path: Path) -> None:
    shutil.copy(mistral_model_file(), tmp_path / "tokenizer.model")
    added = {
        str(32000 + i): {"content": text, "special": True} for i, text in enumerate(("<|end_of_turn|>", "<|pad_0|>"))
    }
    write_json(
        tmp_path / "tokenizer_config.json",
        CONFIG
        | {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, "added_tokens_decoder": added},
    )
    tokenizer = Tokenizer.from_str(read(tmp_path).tokenizer_json)
    assert tokenizer.encode(SINGLE_TURN).ids == SINGLE_TURN_IDS


TOOL = {"content": "<|tool|>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": FAST | {"added_tokens_decoder": {"32002": TOOL | {"special": True}}}},
        {"tokenizer_config": FAST | {"added_tokens_decoder": {"32002": TOOL | {"special": False}}}},
        {"tokenizer_config": FAST | {"additional_special_tokens": ["<|tool|>"]}},
        {"tokenizer_config": FAST | {"pad_token": "<|tool|>"}},
        {"tokenizer_config": FAST, "added_tokens": {"<|tool|>": 32002, "<think>": 32003}},
        {"tokenizer_config": FAST, "special_tokens_map": {"additional_special_tokens": ["<|tool|>"]}},
        {
            "tokenizer_config": FAST,
            "special_tokens_map": {"eos_token": "<|tool|>"},
            "added_tokens": {"<|tool|>": 32002},
        },
        {"tokenizer_config": FAST | {"eos_token": "Hello"}},
    ],
    ids=["decoder", "decoder-shown", "additional", "named", "file", "map", "map-and-file", "word"],
)
def test_added_tokens_are_those_of_transformers_wherever_they_stand(
    folder: Path, files: dict[str, dict[str, Any]]
) -> None:
    for name, content in files.items():
        write_json(folder / f"{name}.json", content)
    reference = AutoTokenizer.from_pretrained(folder)
    tokenizer = Tokenizer.from_str(read(folder, vocab_size=32010).tokenizer_json)
    text = "Hello a<|tool|>b<think> c</s> Hello"
    ids = reference.encode(text)
    assert tokenizer.encode(text).ids == ids
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_a_stated_id_that_transformers_does_not_give_is_noted(folder: Path) -> None:
    write_json(folder / "tokenizer_config.json", FAST | {"added_tokens_decoder": {"32005": TOOL | {"special": True}}})
    files = read(folder, vocab_size=32010)
    assert files.notes == ("tokenizer_config.json gives <|tool|> the id 32005; it is 32002, as in transformers",)


def test_files_that_do_not_go_together_are_refused(folder: Path) -> None:
    write_json(folder / "tokenizer_config.json", FAST | {"added_tokens_decoder": {"32002": 5}})
    with pytest.raises(CheckpointError, match=r"the tokenizer files of .* do not go together: Found a"):
        read(folder)


@pytest.mark.parametrize(
    ("config", "ids"),
    [
        ({}, [1, 22557, 2, 22557]),
        ({"add_bos_token": False}, [22557, 2, 22557]),
        ({"add_eos_token": True}, [1, 22557, 2, 22557, 2]),
        ({"legacy": False}, [1, 22557, 2, 16230]),
        ({"add_prefix_space": False}, [1, 16230, 2, 16230]),
    ],
    ids=str,
)
def test_tokenizer_config_switches_what_stands_around_the_words_of_a_tokenizer_model(
    tmp_path: Path, config: dict[str, Any], ids: list[int]
) -> None:
    shutil.copy(mistral_model_file(), tmp_path / "tokenizer.model")
    write_json(tmp_path / "tokenizer_config.json", config)
    tokenizer = Tokenizer.from_str(read(tmp_path).tokenizer_json)
    assert tokenizer.encode("Hello</s>Hello").ids == ids


def test_a_tokenizer_model_takes_added_tokens_from_the_files_beside_it(tmp_path: Path) -> None:
    shutil.copy(mistral_model_file(), tmp_path / "tokenizer.model")
    write_json(tmp_path / "added_tokens.json", {"<|im_start|>": 32000, "<|im_end|>": 32001})
    special = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    write_json(tmp_path / "tokenizer_config.json", special | {"tokenizer_class": "LlamaTokenizer"})
    tokenizer = Tokenizer.from_str(read(tmp_path).tokenizer_json)
    assert tokenizer.encode("<|im_start|>Hello<|im_end|>").ids == [1, 32000, 22557, 32001]
    assert tokenizer.decode([32000, 22557, 32001]) == "Hello"


def test_a_file_that_is_no_tekken_json_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "tekken.json", {"config": {"version": "v99"}})
    with pytest.raises(CheckpointError, match=r"tekken\.json is no tekken\.json that mistral-common reads: .*v99"):
        read(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no tokenizer: it needs"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object, but a list"),
        ("{}", "is no tokenizer of the tokenizers library"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}', "the tokenizer cannot be loaded"),
    ],
)
def test_an_altered_tokenizer_json_is_refused(folder: Path, content: str, line: str) -> None:
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=line):
        read(folder)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"chat_template": [{"name": "default"}]}, "chat_template is neither a text nor a list of named ones"),
        ({"chat_template": [["default", "x"]]}, "chat_template is neither a text nor a list of named ones"),
        ({"chat_template": 5}, "chat_template is neither a text nor a list of named ones"),
        ({"eos_token": [["</s>"]]}, r"eos_token is .*, not a token"),
        ({"eos_token": {"content": 5}}, r"eos_token is .*, not a token"),
        ({"additional_special_tokens": [["<a>"]]}, "additional_special_tokens is no list of tokens"),
        ({"added_tokens_decoder": {"x": {"content": "<a>"}}}, "added_tokens_decoder has a key that is no token id"),
    ],
    ids=str,
)
def test_a_malformed_tokenizer_config_is_refused(folder: Path, changes: dict[str, Any], line: str) -> None:
    write_json(folder / "tokenizer_config.json", CONFIG | changes)
    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json: {line}"):
        read(folder)


def test_a_template_that_is_not_utf8_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"{{ \xff }}")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja cannot be read: .*utf-8"):
        read(folder)


@pytest.mark.parametrize("eos", ["2", ["2"], [2, None], 2.0, True], ids=str)
def test_an_end_token_that_is_no_id_is_refused(folder: Path, eos: Any) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id is .*, not a token id"):
        read(folder, generation={"eos_token_id": eos})


@pytest.mark.parametrize(
    "changes", [{"post_processor": []}, {"added_tokens": [{"id": 3}]}, {"added_tokens": 5}], ids=str
)
def test_a_malformed_part_of_tokenizer_json_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / "tokenizer.json"
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | changes)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        read(folder)
