"""2,000 random texts for each kind of tokenizer: the ids are those of the library that the tokenizer was made with."""

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from random_texts import random_texts
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tiktoken_ext.openai_public import r50k_pat_str
from tokenizers import Tokenizer as Core
from transformers import AutoTokenizer, LlamaConfig

from starling.engine.errors import UnsupportedModelError
from starling.engine.text.tokenizer import Tokenizer
from starling.export.checkpoints.checkpoint import TokenizerFiles
from starling.export.tokenizers.gguf_tokenizer import gguf_tokenizer_files
from starling.export.tokenizers.sentencepiece_model import read_pieces
from starling.export.tokenizers.starling_tokenizer import mistral_model_file
from starling.export.tokenizers.tokenizer_files import read_tokenizer_files

pytestmark = pytest.mark.slow

COUNT, SEED = 2000, 14
DATA = mistral_model_file().parent
# The patterns of the models' own tokenizer.json.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")


def read(folder: Path, vocab_size: int = 200_000) -> Tokenizer:
    config = LlamaConfig(vocab_size=vocab_size, bos_token_id=1, eos_token_id=2)
    return opened(read_tokenizer_files(folder, config, {}))


def opened(files: TokenizerFiles) -> Tokenizer:
    return Tokenizer(Core.from_str(files.tokenizer_json), {})


def agree(tokenizer: Tokenizer, reference: Callable[[str], list[int]], mixed_in: tuple[str, ...] = ()) -> int:
    """Compare the ids of COUNT texts in which no text is special; how many were not empty."""
    full = 0
    for text in random_texts(COUNT, SEED, mixed_in):
        ids = tokenizer.encode(text, allow_special=False)
        assert ids == reference(text), repr(text)
        full += len(ids) > 2
    return full


@pytest.mark.parametrize("model", sorted(DATA.glob("*.model.v*")), ids=lambda path: path.suffix)
@pytest.mark.parametrize("legacy", [True, False])
def test_a_tokenizer_model_alone_cuts_as_sentencepiece_does(tmp_path: Path, model: Path, legacy: bool) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy}))
    tokenizer, reference = read(tmp_path), SentencePieceProcessor(model_file=str(model))
    spelt_out = ("<s>", "</s>", "<unk>", "<0x0A>", "[INST]")
    # Without legacy a text that begins with a space keeps it as the first word's.
    texts = [text for text in random_texts(COUNT, SEED, spelt_out) if legacy or not text.startswith((" ", "▁"))]
    assert len(texts) > 0.8 * COUNT
    for text in texts:
        assert tokenizer.encode(text, allow_special=False) == [1, *reference.encode(text)], repr(text)
    for text in random_texts(COUNT, SEED):
        ids = reference.encode(text)
        assert tokenizer.decode(ids) == reference.decode(ids), repr(text)


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Trains a small SentencePiece model; the folder that holds it."""

    def make(**options: Any) -> Path:
        folder = tmp_path_factory.mktemp("spm")
        corpus = folder / "corpus.txt"
        corpus.write_text("\n".join(text.replace("\n", " ") for text in random_texts(4000, 1)), encoding="utf-8")
        settings = {"vocab_size": 3000, "character_coverage": 0.98, "byte_fallback": True, "minloglevel": 2} | options
        SentencePieceTrainer.train(input=str(corpus), model_prefix=str(folder / "tokenizer"), **settings)
        return folder

    return make


@pytest.mark.parametrize(
    "options",
    [
        {"normalization_rule_name": "identity", "remove_extra_whitespaces": True},
        {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}
        | {"user_defined_symbols": ["<tag>", "▁▁", "▁▁▁", "\t"]},
        {"normalization_rule_name": "identity", "byte_fallback": False},
    ],
    ids=["squeezed", "user-defined", "unknown-characters"],
)
def test_spaces_and_user_pieces_of_a_model_are_sentencepieces(
    train: Callable[..., Path], options: dict[str, Any]
) -> None:
    folder = train(model_type="bpe", **options)
    reference = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert agree(read(folder), lambda text: [1, *reference.encode(text)], ("<tag>",)) > 0.8 * COUNT


def test_a_model_that_normalizes_differs_at_composed_letters_alone_and_says_so(train: Callable[..., Path]) -> None:
    folder = train(model_type="bpe", normalization_rule_name="nmt_nfkc")
    reference = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    files = read_tokenizer_files(folder, LlamaConfig(vocab_size=3000), {})
    assert files.notes == (
        "letters that are composed of several characters may be normalized otherwise than by SentencePiece",
    )
    tokenizer = opened(files)
    different = [t for t in random_texts(COUNT, SEED) if tokenizer.encode(t) != [1, *reference.encode(t)]]
    assert len(different) < 0.05 * COUNT
    assert all(any(_composes(char) for char in text) for text in different)


def _composes(char: str) -> bool:
    return unicodedata.category(char).startswith("M") or unicodedata.name(char, "").startswith("HALFWIDTH HANGUL")


def test_a_model_whose_words_end_with_their_space_is_refused(train: Callable[..., Path]) -> None:
    folder = train(model_type="bpe", normalization_rule_name="identity", treat_whitespace_as_suffix=True)
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.model cuts .* in a way that the tokenizer\.json made"):
        read(folder)


def test_a_unigram_model_that_transformers_converts_inexactly_is_refused(train: Callable[..., Path]) -> None:
    folder = train(model_type="unigram", normalization_rule_name="nmt_nfkc")
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.model cuts .* in a way that the tokenizer\.json made"):
        read(folder)


def test_the_same_vocabulary_in_a_gguf_file_cuts_as_sentencepiece_does() -> None:
    pieces = read_pieces(mistral_model_file())
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.text for piece in pieces],
        "tokenizer.ggml.scores": [piece.score for piece in pieces],
        "tokenizer.ggml.token_type": [int(piece.kind) for piece in pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    reference = SentencePieceProcessor(model_file=str(mistral_model_file()))
    tokenizer = opened(gguf_tokenizer_files(metadata, len(pieces), where="m.gguf"))
    assert agree(tokenizer, lambda text: [1, *reference.encode(text)], ("</s>",)) > 0.8 * COUNT


@pytest.mark.parametrize("file", sorted(DATA.glob("tekken*.json")), ids=lambda path: path.stem)
def test_tekken_json_cuts_as_mistral_common_does(tmp_path: Path, file: Path) -> None:
    (tmp_path / "tekken.json").write_bytes(file.read_bytes())
    tokenizer, reference = read(tmp_path), Tekkenizer.from_file(file)
    assert agree(tokenizer, lambda text: reference.encode(text, bos=True, eos=False), ("<s>", "[INST]")) > 0.8 * COUNT


@pytest.mark.parametrize(
    ("pre", "pattern", "form"),
    [("gpt-2", r50k_pat_str, None), ("llama-bpe", LLAMA_3, None), ("qwen2", QWEN_2, "NFC"), ("tekken", None, None)],
    ids=["gpt-2", "llama-bpe", "qwen2", "tekken"],
)
def test_a_byte_level_gguf_vocabulary_cuts_as_tiktoken_does(pre: str, pattern: str | None, form: str | None) -> None:
    document = json.loads((DATA / "tekken_240911.json").read_text(encoding="utf-8"))
    tekken = Tekkenizer.from_file(DATA / "tekken_240911.json")
    ranks = {tekken.id_to_byte_piece(1000 + rank): rank for rank in range(30_000)}
    letters = _byte_letters()
    shown = ["".join(letters[byte] for byte in token) for token in ranks]
    merges = [
        f"{''.join(letters[b] for b in token[:cut])} {''.join(letters[b] for b in token[cut:])}"
        for token in ranks
        for cut in _by_rank(token, ranks)
    ]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": shown,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": False,
    }
    reference = tiktoken.Encoding(
        "reference", pat_str=pattern or document["config"]["pattern"], mergeable_ranks=ranks, special_tokens={}
    )

    def wanted(text: str) -> list[int]:
        return reference.encode_ordinary(unicodedata.normalize(form, text) if form else text)

    tokenizer = opened(gguf_tokenizer_files(metadata, len(shown), where="m.gguf"))
    assert agree(tokenizer, wanted) > 0.8 * COUNT


def _by_rank(token: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Where a token may have been joined of two, the earlier pieces first."""
    cuts = [cut for cut in range(1, len(token)) if token[:cut] in ranks and token[cut:] in ranks]
    return sorted(cuts, key=lambda cut: (ranks[token[:cut]], ranks[token[cut:]]))


def _byte_letters() -> dict[int, str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters: dict[int, str] = bytes_to_unicode()
    return letters


def test_added_tokens_of_a_folder_are_those_of_transformers(tmp_path: Path) -> None:
    added = {
        "32000": {"content": "<|tool|>", "special": True, "lstrip": False, "rstrip": True},
        "32001": {"content": "<think>", "special": False, "lstrip": True, "normalized": False},
        "32002": {"content": "word", "special": False, "single_word": True, "normalized": True},
    }
    document = json.loads(_mistral_json())
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|tool|>", "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    reference, tokenizer = AutoTokenizer.from_pretrained(tmp_path), read(tmp_path, 32_003)
    for text in random_texts(COUNT, SEED, ("<|tool|>", "<think>", "word", "words", " <think> ")):
        ids = reference.encode(text)
        assert tokenizer.encode(text) == ids, repr(text)
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True), repr(text)


def _mistral_json() -> str:
    from starling.export.tokenizers.sentencepiece_bpe import sentencepiece_tokenizer_json

    return sentencepiece_tokenizer_json(read_pieces(mistral_model_file()), bos=1)
