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


@dataclass(frozen=True, slots=True)
class Normalization:
    """What happens to a text before it is cut into pieces.

    `charsmap`: SentencePiece's own table, base64; `squeeze`: runs of spaces become one, and those at the ends none;
    `prefix_space`: a word starts where a text does; `after_special`: and after each special token.
    """

    charsmap: str | None = None
    squeeze: bool = False
    prefix_space: bool = True
    after_special: bool = True


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
    how = Normalization(prefix_space=prefix_space)
    document = bpe_document(pieces, how, extra=extra, bos=bos, eos=eos)
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


def bpe_document(
    pieces: Sequence[Piece],
    how: Normalization,
    *,
    extra: Sequence[str] = (),
    bos: int | None = None,
    eos: int | None = None,
) -> dict[str, Any]:
    """The content of tokenizer.json, as `sentencepiece_tokenizer_json` describes it."""
    special = [
        (i, piece.text) for i, piece in enumerate(pieces) if piece.kind in (PieceKind.UNKNOWN, PieceKind.CONTROL)
    ]
    # Taken out of the raw text, where a space is a space; or, as SentencePiece does, out of the normalized one, which
    # the library can do where nothing is put before a text.
    user = [
        (i, piece.text.replace(WORD_START, " ") if how.prefix_space else piece.text)
        for i, piece in enumerate(pieces)
        if piece.kind is PieceKind.USER_DEFINED
    ]
    added = [added_token(i, text) for i, text in special]
    added += [
        added_token(i, text, special=False) | {"normalized": not how.prefix_space and " " not in text}
        for i, text in user
    ]
    added += [added_token(len(pieces) + offset, text) for offset, text in enumerate(extra)]
    renamed = dict(user)
    unknown = next((piece.text for piece in pieces if piece.kind is PieceKind.UNKNOWN), None)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(how)},
        "pre_tokenizer": None if how.after_special else _metaspace(how),
        "post_processor": template_post_processor(
            None if bos is None else (pieces[bos].text, bos), None if eos is None else (pieces[eos].text, eos)
        ),
        "decoder": {"type": "Sequence", "decoders": _decoders(how)},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(piece.kind is PieceKind.BYTE for piece in pieces),
            "ignore_merges": False,
            "vocab": {renamed.get(i, piece.text): i for i, piece in enumerate(pieces)},
            "merges": merges_of(pieces),
        },
    }


def _normalizers(how: Normalization) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    if how.charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": how.charsmap})
    if how.squeeze:
        # Spaces alone (the library's own Strip takes every white character), and at the end what stands for one.
        steps.append({"type": "Replace", "pattern": {"Regex": rf"\A +|[ {WORD_START}]+\z"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if how.prefix_space and how.after_special:
        steps.append({"type": "Prepend", "prepend": WORD_START})
    return [*steps, {"type": "Replace", "pattern": {"String": " "}, "content": WORD_START}]


def _metaspace(how: Normalization) -> dict[str, Any]:
    scheme = "first" if how.prefix_space else "never"
    return {"type": "Metaspace", "replacement": WORD_START, "prepend_scheme": scheme, "split": False}


def _decoders(how: Normalization) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": WORD_START}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    return [*steps, {"type": "Strip", "content": " ", "start": 1, "stop": 0}] if how.prefix_space else steps
