"""The added tokens of a folder, as transformers has them: tokenizer.json's, and those that the files beside it add.

tokenizer_config.json (`added_tokens_decoder`, `eos_token`, `additional_special_tokens`, ...), special_tokens_map.json
and the older added_tokens.json may add tokens and say which are special. Which of them wins is transformers' choice,
so its own reader is asked.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from starling.engine.errors import CheckpointError, one_line

_CONFIG = "tokenizer_config.json"
_OTHERS = ("special_tokens_map.json", "added_tokens.json")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def merge_added_tokens(document: dict[str, Any], tokenizer_config: dict[str, Any], folder: Path) -> list[str]:
    """Set `added_tokens` of a tokenizer.json to what transformers has with the files of `folder` beside it.

    Returns a note for each token that a file gives another id than transformers does.
    Raises CheckpointError where transformers cannot read those files together.
    """
    others = [name for name in _OTHERS if (folder / name).is_file()]
    if not others and not tokenizer_config:
        return []
    # Of all the folder's files only these: a tokenizer class of its own would rebuild the rest of the tokenizer.
    with tempfile.TemporaryDirectory() as scratch:
        for name in others:
            os.symlink((folder / name).resolve(), Path(scratch) / name)
        _write(Path(scratch) / _CONFIG, _as_transformers_wants(tokenizer_config))
        _write(Path(scratch) / "tokenizer.json", document)
        document["added_tokens"] = _read(Path(scratch), folder)
    ids = {token["content"]: token["id"] for token in document["added_tokens"]}
    stated = tokenizer_config.get("added_tokens_decoder") or {}
    return [
        f"{_CONFIG} gives {token['content']} the id {index}; it is {ids[token['content']]}, as in transformers"
        for index, token in stated.items()
        if isinstance(token, dict) and ids.get(token.get("content"), int(index)) != int(index)
    ]


def _as_transformers_wants(tokenizer_config: dict[str, Any]) -> dict[str, Any]:
    """Templates are read elsewhere; and a token that is an object must say that it is one."""
    return {
        key: {"__type": "AddedToken", **value} if key.endswith("_token") and isinstance(value, dict) else value
        for key, value in tokenizer_config.items()
        if key != "chat_template"
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _read(scratch: Path, folder: Path) -> list[dict[str, Any]]:
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(scratch, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises nothing narrower
        problem = one_line(error).replace(str(scratch), str(folder))
        raise CheckpointError(f"the tokenizer files of {folder} do not go together: {problem}") from error
    found = sorted(tokenizer.added_tokens_decoder.items())
    return [
        {"id": i, "content": token.content, **{flag: getattr(token, flag) for flag in _FLAGS}} for i, token in found
    ]
