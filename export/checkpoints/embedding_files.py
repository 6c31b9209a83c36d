"""How sentence-transformers makes a vector of a model's hidden states: modules.json and 1_Pooling/config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from starling.engine.errors import UnsupportedModelError
from starling.export.checkpoints.checkpoint import FILES
from starling.export.tokenizers.tokenizer_files import read_json

EmbeddingPooling = Literal["last", "mean"]
#: Switches of 1_Pooling/config.json that are exported.
_MODES: Mapping[str, EmbeddingPooling] = {"pooling_mode_lasttoken": "last", "pooling_mode_mean_tokens": "mean"}
#: Kinds of modules that are exported, by the last word of their `type`.
_MODULES = ("Transformer", "Pooling", "Normalize")


def embedding_of(folder: Path | None, wanted: EmbeddingPooling | None) -> tuple[EmbeddingPooling, bool]:
    """How the checkpoint in `folder` pools, or as `wanted`, and whether its vectors are normalized.

    Without modules.json they are, as in vLLM. Raises UnsupportedModelError for another pooling, or further modules.
    """
    if folder is None or not folder.is_dir():
        return wanted or "last", True
    modules = folder / "modules.json"
    kinds = [_kind(modules, module) for module in FILES.json_list(modules)] if modules.is_file() else None
    for further in sorted(folder.glob("[0-9]*_Dense")) if kinds is None else []:
        raise UnsupportedModelError(f"{folder} embeds with a further projection, {further.name}: it is not exported")
    files = sorted(folder.glob("[0-9]*_Pooling/config.json"))
    found = wanted or (_pooling(files[0]) if files else "last")
    return found, kinds is None or "Normalize" in kinds


def _kind(file: Path, module: object) -> str:
    named = module.get("type") if isinstance(module, dict) else None
    kind = str(named).rpartition(".")[2]
    if kind not in _MODULES:
        raise UnsupportedModelError(f"{file} has the module {named}: only {', '.join(_MODULES)} are exported")
    return kind


def _pooling(file: Path) -> EmbeddingPooling:
    modes = [name for name, on in read_json(file).items() if name.startswith("pooling_mode_") and on is True]
    if not modes:
        return "last"
    if len(modes) > 1 or modes[0] not in _MODES:
        raise UnsupportedModelError(f"{file} says {' and '.join(modes)}: only {' or '.join(_MODES)} is exported")
    return _MODES[modes[0]]
