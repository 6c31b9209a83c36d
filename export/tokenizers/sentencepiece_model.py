"""tokenizer.model, SentencePiece's own file, read exactly, and compared with SentencePiece itself."""

import base64
import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from starling.engine.errors import CheckpointError, UnsupportedModelError, one_line
from starling.export.checkpoints.checkpoint import FILES
from starling.export.tokenizers.sentencepiece_bpe import WORD_START, Normalization, Piece, PieceKind, bpe_document

_BPE = 2  # TrainerSpec.ModelType
# What SentencePiece and a tokenizer.json may see in different ways: spaces, ends, rare characters, spelt-out pieces.
_PROBES = (
    *("Hello world", " a", "a ", "  two  spaces   three ", "\n", "a\n\n\tb\r\n", "", " ", "   ", "12345 3.14"),
    *("def f(x):\n    return x\n        # y", "aaaaaaa bbbbbbbb ---------- =======", "日本語テスト", "🎉👩 🇫🇷"),
    *(
        "\N{WORD JOINER}x\N{NO-BREAK SPACE}y",
        "e\N{COMBINING ACUTE ACCENT} ñ é",
        "\N{FULLWIDTH LATIN CAPITAL LETTER A} ½",
    ),
    f"{WORD_START}a{WORD_START}",
)
_LONE_MARKS = (
    "\N{IDEOGRAPHIC SPACE}\N{COMBINING HOOK ABOVE}",
    "\N{REVERSED TRIPLE PRIME}\N{COMBINING LATIN SMALL LETTER E}",
)


def read_pieces(model_file: Path) -> list[Piece]:
    """The vocabulary of a SentencePiece model file, in the order of the ids.

    Raises CheckpointError where the file cannot be parsed.
    """
    return _pieces(_proto(model_file))


def sentencepiece_document(model_file: Path, tokenizer_config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """tokenizer.json of a BPE tokenizer.model, with BOS and the space before the first word; and notes.

    `tokenizer_config` may switch them (`add_bos_token`, `add_eos_token`, `add_prefix_space`); `legacy` false: no space
    after special tokens.
    Raises CheckpointError where the file cannot be parsed, UnsupportedModelError where it does something that
    tokenizer.json cannot say.
    """
    proto = _proto(model_file)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    prefix = tokenizer_config.get("add_prefix_space")
    how = Normalization(
        charsmap=base64.b64encode(normalizer.precompiled_charsmap).decode() or None,
        squeeze=normalizer.remove_extra_whitespaces,
        prefix_space=normalizer.add_dummy_prefix if prefix is None else bool(prefix),
        after_special=tokenizer_config.get("legacy") is not False,
    )
    pieces = _pieces(proto)
    adds_bos = tokenizer_config.get("add_bos_token", True) and trainer.bos_id >= 0
    adds_eos = tokenizer_config.get("add_eos_token", False) and trainer.eos_id >= 0
    document = bpe_document(
        pieces, how, bos=trainer.bos_id if adds_bos else None, eos=trainer.eos_id if adds_eos else None
    )
    if how.prefix_space != normalizer.add_dummy_prefix:
        return document, []
    # Without the space after special tokens there is none before a text that begins with a space.
    probes = [text for text in _PROBES if how.after_special or not text.startswith((" ", WORD_START))]
    return document, compare_with_sentencepiece(model_file, document, probes)


def is_bpe(model_file: Path) -> bool:
    """Whether pieces are merged, as Llama's and Gemma's are. Raises CheckpointError where it cannot be parsed."""
    return bool(_proto(model_file).trainer_spec.model_type == _BPE)


def compare_with_sentencepiece(
    model_file: Path, document: dict[str, Any], probes: Sequence[str] = _PROBES
) -> list[str]:
    """Raise UnsupportedModelError where the document cuts one of the probes in another way than SentencePiece does.

    Returns notes where it is only around user-defined pieces, before which there may be a space more, or in
    composed letters, which the tokenizers library normalizes whole.
    """
    from sentencepiece import SentencePieceProcessor

    reference = SentencePieceProcessor(model_file=str(model_file))
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.encode_special_tokens = True

    def same(text: str) -> bool:
        return bool(tokenizer.encode(text, add_special_tokens=False).ids == reference.encode(text))

    other = next((text for text in probes if not same(text)), None)
    if other is not None:
        raise UnsupportedModelError(
            f"{model_file} cuts {other!r} in a way that the tokenizer.json made of it does not: save one with "
            "transformers (AutoTokenizer, save_pretrained), if its ids are those that the model was trained with"
        )
    pieces = _proto(model_file).pieces
    user = [piece.piece.replace(WORD_START, " ") for piece in pieces if piece.type == PieceKind.USER_DEFINED]
    around = [piece for piece in user if not (same(piece) and same(f"a{piece}b {piece} c"))]
    notes = []
    if around:
        named = ", ".join(map(repr, around[:3]))
        notes.append(f"around {named} ({len(around)} in all) spaces differ from SentencePiece's")
    if not all(map(same, _LONE_MARKS)):
        notes.append(
            "letters that are composed of several characters may be normalized otherwise than by SentencePiece"
        )
    return notes


def _pieces(proto: Any) -> list[Piece]:
    return [Piece(piece.piece, piece.score, PieceKind(piece.type)) for piece in proto.pieces]


def _proto(model_file: Path) -> Any:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    proto = import_module("sentencepiece.sentencepiece_model_pb2").ModelProto()
    try:
        proto.ParseFromString(FILES.bytes(model_file))
    except (OSError, DecodeError) as error:
        raise CheckpointError(f"{model_file} is not a SentencePiece model: {one_line(error)}") from error
    if not proto.pieces:
        raise CheckpointError(f"{model_file} is not a SentencePiece model: it has no pieces")
    return proto
