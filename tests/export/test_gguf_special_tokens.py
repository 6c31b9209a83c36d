"""Where the answers of a GGUF model end: as llama.cpp takes it, by the ids that are stated and by the tokens' names."""

import json
from typing import Any

import pytest

from starling.engine.errors import CheckpointError
from starling.export.checkpoints.checkpoint import TokenizerFiles
from starling.export.tokenizers.gguf_tokenizer import gguf_tokenizer_files

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


def read(tokens: list[str], kinds: list[int] | None = None, **ids: int) -> TokenizerFiles:
    letters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*tokens, *letters],
        "tokenizer.ggml.token_type": [*(kinds or [CONTROL] * len(tokens)), *[NORMAL] * len(letters)],
        **{f"tokenizer.ggml.{name}_token_id": index for name, index in ids.items()},
    }
    return gguf_tokenizer_files(metadata, len(tokens) + len(letters), where="m.gguf")


@pytest.mark.parametrize(
    ("tokens", "stated", "ends"),
    [
        (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], {"eos": 0}, (0, 2)),
        (["<|begin_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"], {"eos": 3}, (3, 1, 2)),
        (["<pad>", "<eos>", "<start_of_turn>", "<end_of_turn>"], {"eos": 1}, (1, 3)),
        (["</s>", "[INST]"], {"eos": 0}, (0,)),
        (["x", "y", "z"], {"eos": 2, "eot": 0}, (2, 0)),
        (["x", "y", "z"], {"eos": 2, "eom": 2}, (2,)),
        (["x", "<|end|>"], {}, (1,)),
        (["<|return|>", "<|call|>", "<|end|>"], {"eos": 0}, (0, 1)),
        (["<|tool_response>", "</s>", "<turn|>"], {"eos": 2}, (2, 0)),
        (["<eos>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"], {"eos": 0}, (0, 1, 2, 3)),
        (["<eos>", "a", "b"], {"eos": 0, "fim_pad": 2}, (0, 2)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_answers_end_where_llama_cpp_ends_them(
    tokens: list[str], stated: dict[str, int], ends: tuple[int, ...]
) -> None:
    assert read(tokens, **stated).eos == ends


def test_an_end_token_of_another_type_is_a_control_token_all_the_same() -> None:
    files = read(["<|im_start|>", "<|im_end|>", "<think>"], [NORMAL, NORMAL, USER_DEFINED])
    added = {token["content"]: token["special"] for token in json.loads(files.tokenizer_json)["added_tokens"]}
    assert added == {"<|im_end|>": True, "<think>": False}
    assert files.eos == (1,)


def test_marks_of_the_harmony_format_stay_in_the_text() -> None:
    files = read(["<|start|>", "<|channel|>", "<|message|>", "<|return|>"])
    added = {token["content"]: token["special"] for token in json.loads(files.tokenizer_json)["added_tokens"]}
    assert added == {"<|start|>": False, "<|channel|>": False, "<|message|>": False, "<|return|>": True}


def test_types_that_do_not_fit_the_tokens_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"m\.gguf: tokenizer\.ggml\.token_type does not fit the tokens"):
        read(["<s>"], [3, 3])
