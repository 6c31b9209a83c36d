"""tekken.json, Mistral's file of a byte-level vocabulary with ranks, as tokenizer.json."""

from pathlib import Path
from typing import Any

from starling.engine.errors import CheckpointError, StarlingError, one_line
from starling.engine.text.detokenizer import char_of_byte
from starling.export.checkpoints.checkpoint import FILES
from starling.export.tokenizers.byte_level import BYTES_ONLY, byte_level_document, splits
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
    vocab = {tekken.id_to_piece(i): i for i in range(special)}
    vocab |= {_shown(token): special + rank for rank, token in enumerate(tokens)}
    return byte_level_document(
        vocab,
        _merges(tokens),
        added=[added_token(i, tekken.id_to_piece(i)) for i in range(special)],
        pretokenizers=splits(pattern),
        post_processor=template_post_processor((tekken.id_to_piece(tekken.bos_id), tekken.bos_id), None),
        decoder=BYTES_ONLY,
        whole_words=True,
    )


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


_BYTE_CHARACTERS = str.maketrans({byte: character for character, byte in char_of_byte().items()})
