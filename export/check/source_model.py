"""The model that a checkpoint's files hold, as transformers itself loads it: nothing here goes through our reader."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from starling.engine.errors import StarlingError, one_line
from starling.export.check.packed_source import dequantized_weights
from starling.export.check.torch_reference import cut
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.checkpoints.huggingface import packing_settings, without_packing
from starling.export.checkpoints.model_class import (
    auto_class,
    from_pretrained,
    model_classes,
    names_in_whole,
    without_weights,
)

_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class SourceModel:
    """A model in float32. `names` has for each tensor of its language model the name in `model`; `config` is that
    language model's. `unexpected` are the stored tensors for which transformers has no place, `missing` those of
    `model` that it has not found.
    """

    model: nn.Module
    names: dict[str, str]
    config: PreTrainedConfig
    unexpected: frozenset[str]
    missing: Collection[str]


def load_folder_source(checkpoint: Checkpoint, path: Path) -> SourceModel:
    """The model of the folder at `path`, cut to as many layers as the checkpoint's configuration has.

    Raises StarlingError where transformers cannot load it.
    """
    layers = checkpoint.config.num_hidden_layers
    config: PreTrainedConfig = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    is_cut = layers < config.get_text_config(decoder=True).num_hidden_layers
    model, report = _from_folder(path, cut(config, layers) if is_cut else config)
    classes = model_classes(model.config)
    names = names_in_whole(model, without_weights(classes.language_model, classes.text_config))
    beyond = {name for name in report["unexpected_keys"] if is_cut and beyond_layers(name, layers)}
    return SourceModel(
        model, names, classes.text_config, frozenset(report["unexpected_keys"]) - beyond, report["missing_keys"]
    )


def beyond_layers(name: str, layers: int) -> bool:
    """Whether a tensor is of a layer after the first `layers`."""
    return any(int(number) >= layers for number in _LAYER.findall(name))


def _layer(name: str) -> int:
    """The number of the layer that a stored tensor is of; -1 for none."""
    found = _LAYER.search(name)
    return -1 if found is None else int(found[1])


def _from_folder(folder: Path, config: PreTrainedConfig) -> tuple[PreTrainedModel, dict[str, Any]]:
    """What transformers loads; of quantized weights, which it has other packages for, of their values."""
    layers = config.get_text_config(decoder=True).num_hidden_layers
    settings = packing_settings(config)
    try:
        if settings is not None:
            plain, weights = (
                without_packing(config),
                dequantized_weights(folder, settings, lambda n: _layer(n) < layers),
            )
            return from_pretrained(model_classes(plain).loaded, None, config=plain, state_dict=dict(weights))
        known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
        loader = auto_class(config) if known else model_classes(config).loaded
        return from_pretrained(loader, folder, config=config, local_files_only=True)
    except Exception as error:  # our reader took the files: whatever it is, it is worth a line
        raise StarlingError(f"transformers cannot load {folder} for the check: {one_line(error)}") from error
