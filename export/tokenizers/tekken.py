"""tekken.json, Mistral's file of a byte-level vocabulary with ranks, as tokenizer.json."""

from pathlib import Path
from typing import Any

from starling.engine.errors import CheckpointError, StarlingError, one_line
from starling.export.checkpoints.checkpoint import FILES
from starling.export.tokenizers.sentencepiece_bpe import added_token, template_post_processor


def tekken_document(path: Path) -> dict[str, Any]:
    """tokenizer.json of a tekken.json: its special tokens first, then the vocabulary; BOS before each text.

    Raises CheckpointError where mistral-common cannot read the file, StarlingError without that package.
    """
    try:
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer
    except ModuleNotFoundError as error:
        raise StarlingError(f"{path} takes the package mistral-common: pip install 'mistral-common>=1.8'") from error
    stated = FILES.json(path)
    try:
        tekken = Tekkenizer.from_file(path)
        pattern = stated["config"]["pattern"]
    except Exception as error:  # it computes with the values before it looks at them
        raise CheckpointError(f"{path} is no tekken.json that mistral-common reads: {one_line(error)}") from error
    special = tekken.num_special_tokens
    tokens = [tekken.id_to_byte_piece(i) for i in range(special, tekken.n_words)]
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(i, tekken.id_to_piece(i)) for i in range(special)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, to_bytes]},
        "post_processor": template_post_processor((tekken.id_to_piece(tekken.bos_id), tekken.bos_id), None),
        "decoder": to_bytes,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a word that is whole in the vocabulary is taken before any merge
            "vocab": {
                **{tekken.id_to_piece(i): i for i in range(special)},
                **{_shown(token): special + rank for rank, token in enumerate(tokens)},
            },
            "merges": _merges(tokens),
        },
    }


def _merges(tokens: list[bytes]) -> list[list[str]]:
    """Every way to join two tokens into a third; the third's rank is the merge's."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    found: list[tuple[int, int, int]] = []
    for rank, token in enumerate(tokens):
        for cut in range(1, len(token)):
            left, right = ranks.get(token[:cut]), ranks.get(token[cut:])
            if left is not None and right is not None:
                found.append((rank, left, right))
    return [[_shown(tokens[left]), _shown(tokens[right])] for _, left, right in sorted(found)]


def _shown(token: bytes) -> str:
    return token.decode("latin-1").translate(_BYTE_CHARACTERS)


def _byte_characters() -> dict[int, str]:
    """GPT-2's characters of the bytes: the printable ones are themselves, the others follow from 256."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(256 + place) for place, byte in enumerate(others)}


_BYTE_CHARACTERS = _byte_characters()
