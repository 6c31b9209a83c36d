"""The tokenizer inside a GGUF file as tokenizer.json.

`tokenizer.ggml.pre` names the way the text is split before the merges; it decides the ids, so an unknown one is
refused. (transformers' own converter ignores some of them: SmolLM2 loses its digit splitting.)
"""

import json
from typing import Any

from starling.engine.errors import CheckpointError, UnsupportedModelError
from starling.export.checkpoints.checkpoint import TokenizerFiles
from starling.export.tokenizers.sentencepiece_bpe import (
    Piece,
    PieceKind,
    added_token,
    sentencepiece_tokenizer_json,
    template_post_processor,
)
from starling.export.tokenizers.tokenizer_files import check_loads, templates_of

BYTE_LEVEL: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES_ONLY = BYTE_LEVEL | {"use_regex": False}
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"


def _splits(*patterns: str) -> list[dict[str, Any]]:
    split = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in patterns]
    return [*split, BYTES_ONLY]


def _words(digits: str) -> str:
    return (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


# tokenizer.ggml.pre -> the pre-tokenizers, as in llama.cpp's src/llama-vocab.cpp
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "default": _splits(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": [BYTE_LEVEL],
    "llama-bpe": _splits(_words(r"\p{N}{1,3}")),
    "qwen2": _splits(_words(r"\p{N}")),
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL],
}
# Whole words that are in the vocabulary are taken before any merge; and BOS is added where the file does not say.
LLAMA_BPE = "llama-bpe"
NORMALIZERS = {"qwen2": {"type": "NFC"}}


def gguf_tokenizer_files(metadata: dict[str, Any], vocab_size: int, *, where: str) -> TokenizerFiles:
    """The tokenizer, its special tokens and its chat templates, from the metadata of the GGUF file `where`.

    Raises CheckpointError where the file has no tokenizer, or one larger than `vocab_size`; UnsupportedModelError for a
    tokenizer model or a pre-tokenizer that is not known.
    """
    tokens, token_ids = metadata.get("tokenizer.ggml.tokens"), _token_ids(metadata)
    if not tokens:
        raise CheckpointError(f"{where} has no tokenizer (tokenizer.ggml.tokens): get a file that carries one")
    outside = [index for index in (len(tokens) - 1, *token_ids.values()) if index >= min(vocab_size, len(tokens))]
    if outside:
        raise CheckpointError(f"{where}: token id {outside[0]} is outside the vocabulary of {vocab_size}: get it again")
    model = metadata.get("tokenizer.ggml.model")
    builders = {"gpt2": _byte_level_json, "llama": _sentencepiece_json}
    if model not in builders:
        raise UnsupportedModelError(f"{where}: tokenizer model {model!r} is not among {', '.join(builders)}")
    tokenizer_json = builders[model](metadata, token_ids, where)
    check_loads(tokenizer_json, where=where)
    named = {
        f"{name}_token": tokens[index] for name, index in token_ids.items() if name in ("bos", "eos", "unk", "pad")
    }
    template, extra = templates_of(_templates(metadata))
    eos = [token_ids[name] for name in ("eos", "eot", "eom") if name in token_ids]
    return TokenizerFiles(
        tokenizer_json=tokenizer_json,
        tokenizer_config={
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "add_bos_token": _adds(metadata, "bos"),
            "add_eos_token": _adds(metadata, "eos"),
            **named,
        },
        special_tokens_map=named,
        chat_template=template,
        additional_chat_templates=extra,
        bos=token_ids.get("bos"),
        eos=tuple(dict.fromkeys(eos)),
        pad=token_ids.get("pad"),
    )


def _token_ids(metadata: dict[str, Any]) -> dict[str, int]:
    keys = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "unk": "unknown", "pad": "padding"}
    found = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    return {name: index for name, index in found.items() if index is not None}


def _templates(metadata: dict[str, Any]) -> dict[str, str]:
    prefix = "tokenizer.chat_template"
    named = {key.removeprefix(f"{prefix}."): text for key, text in metadata.items() if key.startswith(f"{prefix}.")}
    return named | ({"default": metadata[prefix]} if prefix in metadata else {})


def _adds(metadata: dict[str, Any], which: str) -> bool:
    pre, model = metadata.get("tokenizer.ggml.pre"), metadata.get("tokenizer.ggml.model")
    default = which == "bos" and (model == "llama" or pre == LLAMA_BPE)
    return bool(metadata.get(f"tokenizer.ggml.add_{which}_token", default))


def _added_ids(metadata: dict[str, Any], token_ids: dict[str, int]) -> tuple[int | None, int | None]:
    bos = token_ids.get("bos") if _adds(metadata, "bos") else None
    eos = token_ids.get("eos") if _adds(metadata, "eos") else None
    return bos, eos


def _byte_level_json(metadata: dict[str, Any], token_ids: dict[str, int], where: str) -> str:
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        raise UnsupportedModelError(
            f"{where}: pre-tokenizer {pre!r} (tokenizer.ggml.pre) is not among {', '.join(PRE_TOKENIZERS)}: "
            "export the Hugging Face folder instead"
        )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    kinds = metadata.get("tokenizer.ggml.token_type") or [PieceKind.NORMAL] * len(tokens)
    if len(kinds) != len(tokens):
        raise CheckpointError(f"{where}: tokenizer.ggml.token_type does not fit the tokens: get the file again")
    bos, eos = _added_ids(metadata, token_ids)
    template = template_post_processor(
        None if bos is None else (tokens[bos], bos), None if eos is None else (tokens[eos], eos)
    )
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            added_token(index, token, special=kind == PieceKind.CONTROL)
            for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind in (PieceKind.CONTROL, PieceKind.USER_DEFINED)
        ],
        "normalizer": NORMALIZERS.get(pre),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
        "post_processor": template,
        "decoder": BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre == LLAMA_BPE,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": metadata.get("tokenizer.ggml.merges", []),
        },
    }
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


def _sentencepiece_json(metadata: dict[str, Any], token_ids: dict[str, int], where: str) -> str:
    tokens, scores, kinds = (metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "scores", "token_type"))
    try:
        pieces = [Piece(t, s, PieceKind(k)) for t, s, k in zip(tokens or (), scores or (), kinds or (), strict=True)]
    except ValueError as error:
        raise CheckpointError(
            f"{where}: tokenizer.ggml.scores or .token_type does not fit the tokens ({error}): get the file again"
        ) from error
    bos, eos = _added_ids(metadata, token_ids)
    prefix_space = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    return sentencepiece_tokenizer_json(pieces, bos=bos, eos=eos, prefix_space=prefix_space)
