"""Starling's own tokenizer and chat templates, without a model hub.

The vocabulary is Mistral-7B-v0.1's SentencePiece model, which the package mistral-common carries; Starling adds two
special tokens after it.
"""

import importlib.util
from functools import cache
from importlib import resources
from pathlib import Path

from starling.engine.errors import CheckpointError
from starling.export.tokenizers.sentencepiece_bpe import sentencepiece_tokenizer_json
from starling.export.tokenizers.sentencepiece_model import read_pieces

BOS, END_OF_TURN, PAD = 1, 32000, 32001
EXTRA_TOKENS = ("<|end_of_turn|>", "<|pad_0|>")
VOCAB_SIZE = 32002

# Mode of the OpenChat template -> the words before "User:" and "Assistant:".
OPENCHAT_MODES = {"default": "GPT4 Correct", "code": "Code", "math": "Math Correct"}


@cache
def starling_tokenizer_json() -> str:
    """tokenizer.json of Starling-LM-7B-alpha: 32,000 pieces, `<|end_of_turn|>` 32000, `<|pad_0|>` 32001, BOS put first.

    Raises ModuleNotFoundError without mistral-common, CheckpointError where it has no such model.
    """
    return sentencepiece_tokenizer_json(read_pieces(mistral_model_file()), extra=EXTRA_TOKENS, bos=BOS)


@cache
def openchat_template(mode: str = "default") -> str:
    """The Jinja chat template of OpenChat 3.5 and Starling; `mode` is a key of OPENCHAT_MODES."""
    source = (
        resources.files("starling.export.tokenizers").joinpath("templates/openchat.jinja").read_text(encoding="utf-8")
    )
    return source.replace("ROLE_PREFIX", OPENCHAT_MODES[mode])


def openchat_extra_templates() -> dict[str, str]:
    """The templates that stand beside the default one: `code` and `math`."""
    return {mode: openchat_template(mode) for mode in OPENCHAT_MODES if mode != "default"}


def mistral_model_file() -> Path:
    # find_spec does not import mistral_common, whose import takes a second.
    spec = importlib.util.find_spec("mistral_common")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("Starling's tokenizer comes with the package mistral-common", name="mistral_common")
    path = Path(spec.origin).parent / "data" / "tokenizer.model.v1"
    if not path.is_file():
        raise CheckpointError("this mistral-common has no data/tokenizer.model.v1: pip install 'mistral-common>=1.8'")
    return path
