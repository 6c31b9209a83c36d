"""tokenizer.json of byte-level vocabularies, whose tokens are bytes written in GPT-2's alphabet."""

from collections.abc import Mapping, Sequence
from typing import Any

#: Words are cut as GPT-2 cuts them, and their bytes written in its alphabet; or the bytes alone are.
BYTE_LEVEL: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES_ONLY = BYTE_LEVEL | {"use_regex": False}


def splits(*patterns: str) -> list[dict[str, Any]]:
    """Pre-tokenizers that cut a text by each regular expression in turn, and then into bytes."""
    split = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in patterns]
    return [*split, BYTES_ONLY]


def byte_level_document(
    vocab: Mapping[str, int],
    merges: Sequence[Any],
    *,
    added: Sequence[dict[str, Any]],
    pretokenizers: Sequence[dict[str, Any]],
    post_processor: dict[str, Any] | None,
    decoder: dict[str, Any],
    whole_words: bool,
    normalizer: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of tokenizer.json. With `whole_words` a word that is in the vocabulary is taken before any merge."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(added),
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(pretokenizers)},
        "post_processor": post_processor,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": whole_words,
            "vocab": dict(vocab),
            "merges": list(merges),
        },
    }
