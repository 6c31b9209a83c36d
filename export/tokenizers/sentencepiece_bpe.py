"""tokenizer.json of a SentencePiece BPE vocabulary: the kind of tokenizer that Llama 2, Mistral and Starling have."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"


class PieceKind(IntEnum):
    """What a piece is, numbered as in sentencepiece's own model file and in `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of the vocabulary; its id is its place in the list. Pieces of a higher score are merged first."""

    text: str
    score: float
    kind: PieceKind


def merges_of(pieces: Sequence[Piece]) -> list[str]:
    """The merge list, most urgent first, as "left right": every way to join two pieces into a third.

    Control, unknown and byte pieces take no part, as in sentencepiece, where text that spells `</s>` or `<0x0A>`
    stays text.
    """
    joinable = {piece.text: i for i, piece in enumerate(pieces) if piece.kind in (PieceKind.NORMAL, PieceKind.UNUSED)}
    merges: list[tuple[float, int, int, int, str]] = []
    for text, index in joinable.items():
        for cut in range(1, len(text)):
            left, right = joinable.get(text[:cut]), joinable.get(text[cut:])
            if left is not None and right is not None:
                merges.append((-pieces[index].score, index, left, right, f"{text[:cut]} {text[cut:]}"))
    merges.sort()
    return [merge[-1] for merge in merges]


def added_token(index: int, text: str, *, special: bool = True) -> dict[str, Any]:
    """One entry of tokenizer.json's `added_tokens`: matched in the raw text, no spaces eaten around it."""
    return {
        "id": index,
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def template_post_processor(bos: tuple[str, int] | None, eos: tuple[str, int] | None) -> dict[str, Any] | None:
    """A post-processor that puts `bos` before and `eos` after each text; None where there is neither."""
    tokens = [token for token in (bos, eos) if token is not None]
    if not tokens:
        return None
    special: list[list[dict[str, Any]]] = [
        [] if token is None else [{"SpecialToken": {"id": token[0], "type_id": 0}}] for token in (bos, eos)
    ]
    single = [*special[0], {"Sequence": {"id": "A", "type_id": 0}}, *special[1]]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, *special[0], {"Sequence": {"id": "B", "type_id": 1}}, *special[1]],
        "special_tokens": {text: {"id": text, "ids": [index], "tokens": [text]} for text, index in tokens},
    }


def sentencepiece_tokenizer_json(
    pieces: Sequence[Piece],
    *,
    extra: Sequence[str] = (),
    bos: int | None = None,
    eos: int | None = None,
    prefix_space: bool = True,
) -> str:
    """tokenizer.json with byte fallback and the *legacy* prefix: text after a special token starts a word again.

    `extra` are special tokens whose ids follow the vocabulary; the post-processor adds the ids `bos` and `eos`.
    """
    special = [
        (i, piece.text) for i, piece in enumerate(pieces) if piece.kind in (PieceKind.UNKNOWN, PieceKind.CONTROL)
    ]
    user = [(i, piece.text) for i, piece in enumerate(pieces) if piece.kind is PieceKind.USER_DEFINED]
    added = [added_token(i, text) for i, text in special] + [added_token(i, text, special=False) for i, text in user]
    added += [added_token(len(pieces) + offset, text) for offset, text in enumerate(extra)]
    unknown = next((piece.text for piece in pieces if piece.kind is PieceKind.UNKNOWN), None)
    to_word_start = {"type": "Replace", "pattern": {"String": " "}, "content": WORD_START}
    prefix = [{"type": "Prepend", "prepend": WORD_START}] if prefix_space else []
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": WORD_START}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix_space:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, to_word_start]},
        "pre_tokenizer": None,
        "post_processor": template_post_processor(
            None if bos is None else (pieces[bos].text, bos), None if eos is None else (pieces[eos].text, eos)
        ),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(piece.kind is PieceKind.BYTE for piece in pieces),
            "ignore_merges": False,
            "vocab": {piece.text: i for i, piece in enumerate(pieces)},
            "merges": merges_of(pieces),
        },
    }
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))
