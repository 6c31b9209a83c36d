"""The model that a GGUF file holds, read by the package gguf and put in place by transformers' own GGUF code.

The exporter's reader has its own header parser, table of keys, names and row orders: none of them is used here.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from transformers import PreTrainedConfig
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    Gemma2TensorProcessor,
    LlamaTensorProcessor,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from starling.export.check.source_model import SourceModel
from starling.export.checkpoints.checkpoint import Checkpoint, empty_model
from starling.export.checkpoints.model_class import from_pretrained, model_classes, names_in_whole

_PART = re.compile(r"(.+)-00001-of-(\d{5})\.gguf")
_LAYER = re.compile(r"blk\.(\d+)\.")
# What llama.cpp's converter does to the tensors of architectures that transformers reads from no GGUF file: what it
# does to those of Llama (rows of query and key in pairs) and of Gemma 2 (norms stored plus one).
_OTHER_PROCESSORS = {"granite": LlamaTensorProcessor, "gemma": Gemma2TensorProcessor}
# The rotary factors of Llama 3, which are in the configuration, and half of a head where a part of it is rotated.
_ROPE_FACTORS, _ROTATED = "rope_freqs.weight", "rope.dimension_count"


def load_gguf_source(checkpoint: Checkpoint, path: Path) -> SourceModel:
    """The model of the file at `path` (of one in parts the first), cut to the layers of the checkpoint's configuration.

    Its configuration is the checkpoint's with the values that the file has by transformers' table of keys.
    """
    readers = [GGUFReader(part) for part in _parts(path)]
    architecture = str(_value(readers[0], "general.architecture"))
    config = _configuration(checkpoint.config, readers[0], architecture)
    kind: Any = TENSOR_PROCESSORS.get(architecture, _OTHER_PROCESSORS.get(architecture, TensorProcessor))
    processor = kind(config=config.to_dict())
    skeleton = empty_model(config)
    # Without modules inside it: the map would be made anew for each of them.
    names = SimpleNamespace(config=config, state_dict=skeleton.state_dict, named_children=tuple)
    places = get_gguf_hf_weights_map(names, processor, model_type=architecture)
    weights: dict[str, torch.Tensor] = {}
    unexpected = set()
    for tensor in (tensor for reader in readers for tensor in reader.tensors):
        if tensor.name in places:
            values = processor.process(dequantize(tensor.data, tensor.tensor_type), name=tensor.name).weights
            weights[places[tensor.name]] = torch.from_numpy(np.array(values, dtype=np.float32))
        elif tensor.name != _ROPE_FACTORS and not _is_beyond(tensor.name, config.num_hidden_layers):
            unexpected.add(tensor.name)
    classes = model_classes(config)
    model, report = from_pretrained(classes.language_model, None, config=config, state_dict=weights)
    return SourceModel(model, names_in_whole(model, skeleton), config, frozenset(unexpected), report["missing_keys"])


def _parts(path: Path) -> Iterator[Path]:
    found = _PART.fullmatch(path.name)
    count = 1 if found is None else int(found[2])
    for number in range(1, count + 1):
        yield path if found is None else path.with_name(f"{found[1]}-{number:05}-of-{found[2]}.gguf")


def _value(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _configuration(ours: PreTrainedConfig, reader: GGUFReader, architecture: str) -> PreTrainedConfig:
    """`ours`, with what the file says otherwise by transformers' table; numbers on file have the width of a float32."""
    config = copy.deepcopy(ours)
    tables = cast(dict[str, dict[str, str | None]], GGUF_CONFIG_MAPPING)
    table = tables.get(architecture, tables["llama"])
    for key, name in table.items():
        value = _value(reader, f"{architecture}.{key}")
        if key == _ROTATED or name in (None, "num_hidden_layers") or not isinstance(value, (int, float)):
            continue
        rope = _rope_with_base(config) if name == "rope_theta" else None
        known = getattr(config, str(name), None) if rope is None else rope["rope_theta"]
        if np.float32(known or 0) == np.float32(value):
            continue
        if rope is None:
            setattr(config, str(name), value)
        else:
            rope["rope_theta"] = value
    return config


def _rope_with_base(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings with the rotary base that a file states: where kinds of layers have their own, full attention's."""
    rope: dict[str, Any] = config.rope_parameters
    return rope if "rope_theta" in rope else rope["full_attention"]


def _is_beyond(name: str, layers: int) -> bool:
    found = _LAYER.match(name)
    return found is not None and int(found[1]) >= layers
