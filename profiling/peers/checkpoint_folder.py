"""A checkpoint as the Hugging Face folder that every peer's converter reads the same way, whatever it came as."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from starling.export.bundle_folder import new_bundle_folder, write_json, write_tokenizer
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.checkpoints.model_source import open_checkpoint

#: The GGUF file that the folder was written from, for the peers that want one.
GGUF = "source.gguf"


def write_checkpoint(model: str, out: Path) -> None:
    """Write MODEL (see `open_checkpoint`) to the new folder `out`, which appears whole or not at all.

    Raises StarlingError where the model cannot be read or the folder cannot be written.
    """
    from safetensors.torch import save_file

    checkpoint = open_checkpoint(model)
    with new_bundle_folder(out, force=False) as work:
        write_json(work / "config.json", _config(checkpoint))
        write_tokenizer(work, checkpoint.tokenizer, checkpoint.generation)
        write_json(work / "tokenizer_config.json", _tokenizer_config(checkpoint))
        tensors = checkpoint.tensors
        weights = {name: tensors.rows(name, 0, tensors.shape(name)[0]).contiguous() for name in tensors.names()}
        save_file(weights, work / "model.safetensors", metadata={"format": "pt"})
        if (gguf := _gguf(model)) is not None:
            shutil.copyfile(gguf, work / GGUF)


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json for transformers 5 and 4: the latter reads rope_theta where the former has rope_parameters."""
    config: dict[str, Any] = json.loads(checkpoint.config.to_json_string(use_diff=False))
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        scaled = rope.get("rope_type", "default") != "default"
        config |= {"rope_theta": rope["rope_theta"], "rope_scaling": rope if scaled else None}
    return config | {"torch_dtype": config.get("dtype")}


def _tokenizer_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """tokenizer_config.json with the chat template and the added tokens that transformers 4 looks for in it."""
    files = checkpoint.tokenizer
    added = json.loads(files.tokenizer_json)["added_tokens"]
    decoder = {str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in added}
    return {**files.tokenizer_config, "added_tokens_decoder": decoder, "chat_template": files.chat_template}


def _gguf(model: str) -> Path | None:
    if model == "demo":
        from starling.export.checkpoints.demo_model import demo_gguf

        return demo_gguf()
    return Path(model) if model.endswith(".gguf") else None
