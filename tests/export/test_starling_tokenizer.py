"""Starling's tokenizer and chat templates give the ids of the model's card, and those of sentencepiece itself."""

from pathlib import Path

import jinja2
import jinja2.lexer
import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from starling.engine.errors import CheckpointError
from starling.export.tokenizers.sentencepiece_model import read_pieces
from starling.export.tokenizers.starling_tokenizer import (
    OPENCHAT_MODES,
    mistral_model_file,
    openchat_template,
    starling_tokenizer_json,
)

# The card's assertions: GPT4 Correct User: / GPT4 Correct Assistant: / Code User: …
USER = [420, 6316, 28781, 3198, 3123, 1247, 28747]
ASSISTANT = [420, 6316, 28781, 3198, 3123, 21631, 28747]
SINGLE_TURN = [1, *USER, 22557, 32000, *ASSISTANT]
MULTI_TURN = [1, *USER, 22557, 32000, *ASSISTANT, 15359, 32000, *USER, 1602, 460, 368, 3154, 28804, 32000, *ASSISTANT]
CODING = [1, 7596, 1247, 28747, 26256, 2936, 7653, 1413, 334, 1680, 32000, 7596, 21631, 28747]

TEXTS = [
    "",
    " ",
    "  ",
    " leading",
    "trailing ",
    "a  b   c     d",
    "\n\n\t x\r\n",
    "def f(x):\n    return x\n        y",
    "日本語 テスト 🎉 émoji ñ",
    "▁ is the word start",
    "1234567890 3.14",
    "<s> </s> <unk> <0x0A> spelled out",
    *Path(jinja2.lexer.__file__).read_text(encoding="utf-8").split("\n\n"),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_str(starling_tokenizer_json())


def render(mode: str, messages: list[dict[str, str]]) -> str:
    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    template = jinja2.Environment().from_string(openchat_template(mode))
    return template.render(
        bos_token="<s>", messages=messages, add_generation_prompt=True, raise_exception=refuse
    ).removeprefix("<s>")


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.mark.parametrize(
    ("mode", "messages", "ids"),
    [
        ("default", turns("Hello"), SINGLE_TURN),
        ("default", turns("Hello", "Hi", "How are you today?"), MULTI_TURN),
        ("code", turns("Implement quicksort using C++"), CODING),
    ],
    ids=["single", "multi", "coding"],
)
def test_the_cards_token_ids_hold_exactly(
    tokenizer: Tokenizer, mode: str, messages: list[dict[str, str]], ids: list[int]
) -> None:
    assert tokenizer.encode(render(mode, messages)).ids == ids


def test_each_mode_has_its_own_role_prefix() -> None:
    prompts = {mode: render(mode, turns("Hi")) for mode in OPENCHAT_MODES}
    assert prompts == {
        "default": "GPT4 Correct User: Hi<|end_of_turn|>GPT4 Correct Assistant:",
        "code": "Code User: Hi<|end_of_turn|>Code Assistant:",
        "math": "Math Correct User: Hi<|end_of_turn|>Math Correct Assistant:",
    }


def test_a_system_message_is_its_bare_text() -> None:
    prompt = render("default", [{"role": "system", "content": "Be brief."}, *turns("Hi")])
    assert prompt == "Be brief.<|end_of_turn|>GPT4 Correct User: Hi<|end_of_turn|>GPT4 Correct Assistant:"


def test_an_unknown_role_is_refused() -> None:
    with pytest.raises(jinja2.TemplateError, match="unknown role 'tool'"):
        render("default", [{"role": "tool", "content": "x"}])


def test_every_text_is_encoded_as_sentencepiece_does(tokenizer: Tokenizer) -> None:
    reference = SentencePieceProcessor(model_file=str(mistral_model_file()))
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.encode_special_tokens = True
    assert len(TEXTS) > 50
    for text in TEXTS:
        ids = plain.encode(text, add_special_tokens=False).ids
        assert ids == reference.encode(text), text
        assert plain.decode(ids) == reference.decode(ids), text


def test_the_two_extra_tokens_follow_the_vocabulary(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == 32002
    assert tokenizer.token_to_id("<|end_of_turn|>") == 32000
    assert tokenizer.token_to_id("<|pad_0|>") == 32001
    assert tokenizer.encode("x").ids[0] == tokenizer.token_to_id("<s>") == 1


def test_a_file_that_is_no_sentencepiece_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match="is not a SentencePiece model"):
        read_pieces(tmp_path / "tokenizer.model")
