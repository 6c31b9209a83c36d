"""The tokenizer inside a GGUF file as tokenizer.json.

`tokenizer.ggml.pre` names the way the text is split before the merges; it decides the ids, so an unknown one is
refused. (transformers' own converter ignores some of them: SmolLM2 loses its digit splitting.)
"""

import json
from typing import Any

from starling.engine.errors import CheckpointError, UnsupportedModelError
from starling.export.checkpoints.checkpoint import TokenizerFiles
from starling.export.tokenizers.byte_level import BYTE_LEVEL, byte_level_document, splits
from starling.export.tokenizers.gguf_special_tokens import end_ids, stated_ids, token_kinds
from starling.export.tokenizers.sentencepiece_bpe import (
    Piece,
    PieceKind,
    added_token,
    sentencepiece_tokenizer_json,
    template_post_processor,
)
from starling.export.tokenizers.tokenizer_files import check_loads, templates_of

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"


def _words(digits: str) -> str:
    return (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_GPT_2: list[dict[str, Any]] = [BYTE_LEVEL]
_LLAMA_3 = splits(_words(r"\p{N}{1,3}"))
_QWEN_2 = splits(_words(r"\p{N}"))
_DIGITS_APART: list[dict[str, Any]] = [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]
_CASED = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]%s[\p{Ll}\p{Lm}\p{Lo}\p{M}]%s"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED % ('*', '+')}|[^\r\n\p{{L}}\p{{N}}]?{_CASED % ('+', '*')}"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> the pre-tokenizers, as in llama.cpp's src/llama-vocab.cpp
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "default": splits(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "granite-docling"), _GPT_2),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe"), _LLAMA_3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), _QWEN_2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _DIGITS_APART),
    "tekken": splits(_TEKKEN),
}
# Words that are whole in the vocabulary are taken before any merge; and BOS is added where the file does not say.
WHOLE_WORDS = frozenset({"llama-bpe", "llama3", "llama-v3", "tekken"})
NORMALIZERS = {"qwen2": {"type": "NFC"}, "deepseek-r1-qwen": {"type": "NFC"}}


def gguf_tokenizer_files(metadata: dict[str, Any], vocab_size: int, *, where: str) -> TokenizerFiles:
    """The tokenizer, its special tokens and its chat templates, from the metadata of the GGUF file `where`.

    Raises CheckpointError where the file has no tokenizer, or one larger than `vocab_size`; UnsupportedModelError for a
    tokenizer model or a pre-tokenizer that is not known.
    """
    tokens, token_ids = metadata.get("tokenizer.ggml.tokens"), stated_ids(metadata)
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
        eos=end_ids(metadata),
        pad=token_ids.get("pad"),
    )


def _templates(metadata: dict[str, Any]) -> dict[str, str]:
    prefix = "tokenizer.chat_template"
    named = {key.removeprefix(f"{prefix}."): text for key, text in metadata.items() if key.startswith(f"{prefix}.")}
    return named | ({"default": metadata[prefix]} if prefix in metadata else {})


def _adds(metadata: dict[str, Any], which: str) -> bool:
    pre, model = metadata.get("tokenizer.ggml.pre"), metadata.get("tokenizer.ggml.model")
    default = which == "bos" and (model == "llama" or pre in WHOLE_WORDS)
    return bool(metadata.get(f"tokenizer.ggml.add_{which}_token", default))


def _added_ids(metadata: dict[str, Any], token_ids: dict[str, int]) -> tuple[int | None, int | None]:
    bos = token_ids.get("bos") if _adds(metadata, "bos") else None
    eos = token_ids.get("eos") if _adds(metadata, "eos") else None
    return bos, eos


def _kinds(metadata: dict[str, Any], where: str) -> list[PieceKind]:
    try:
        return token_kinds(metadata)
    except ValueError as error:
        raise CheckpointError(f"{where}: tokenizer.ggml.token_type does not fit the tokens ({error})") from error


def _byte_level_json(metadata: dict[str, Any], token_ids: dict[str, int], where: str) -> str:
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        raise UnsupportedModelError(
            f"{where}: pre-tokenizer {pre!r} (tokenizer.ggml.pre) is not among {', '.join(PRE_TOKENIZERS)}: "
            "export the Hugging Face folder instead"
        )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    kinds = _kinds(metadata, where)
    bos, eos = _added_ids(metadata, token_ids)
    template = template_post_processor(
        None if bos is None else (tokens[bos], bos), None if eos is None else (tokens[eos], eos)
    )
    document = byte_level_document(
        {token: index for index, token in enumerate(tokens)},
        metadata.get("tokenizer.ggml.merges", []),
        added=[
            added_token(index, token, special=kind == PieceKind.CONTROL)
            for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind in (PieceKind.CONTROL, PieceKind.USER_DEFINED)
        ],
        normalizer=NORMALIZERS.get(pre),
        pretokenizers=PRE_TOKENIZERS[pre],
        post_processor=template,
        decoder=BYTE_LEVEL,
        whole_words=pre in WHOLE_WORDS,
    )
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


def _sentencepiece_json(metadata: dict[str, Any], token_ids: dict[str, int], where: str) -> str:
    tokens, kinds, scores = (
        metadata["tokenizer.ggml.tokens"],
        _kinds(metadata, where),
        metadata["tokenizer.ggml.scores"],
    )
    try:
        pieces = [Piece(t, s, k) for t, s, k in zip(tokens, scores, kinds, strict=True)]
    except ValueError as error:
        raise CheckpointError(f"{where}: tokenizer.ggml.scores does not fit the tokens ({error})") from error
    bos, eos = _added_ids(metadata, token_ids)
    prefix_space = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    return sentencepiece_tokenizer_json(pieces, bos=bos, eos=eos, prefix_space=prefix_space)
