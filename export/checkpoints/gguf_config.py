"""The transformers configuration that a GGUF file's metadata describes; what it cannot say is refused by name."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoConfig

from starling.engine.errors import UnsupportedModelError
from starling.export.checkpoints.config_bounds import check_config
from starling.export.checkpoints.gguf_architectures import (
    ARCHITECTURES,
    COMMON_KEYS,
    DESCRIPTIVE,
    NEUTRAL,
    GgufArchitecture,
    Values,
)
from starling.export.checkpoints.gguf_file import GgufFile
from starling.export.checkpoints.gguf_rope import ROPE_FACTORS, llama3_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_ELSEWHERE = "export the Hugging Face folder instead"
_TOKEN_IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
# What a file may say besides the model itself; metadata under another first word belongs to something else.
_GENERAL_PREFIXES = ("general", "tokenizer", "split", "quantize", "mradermacher")


def architecture_name(file: GgufFile) -> str:
    """The file's general.architecture, one of ARCHITECTURES. Raises UnsupportedModelError for any other."""
    kind = file.metadata.get("general.type", "model")
    if kind != "model":
        raise UnsupportedModelError(f"{file.path} is a GGUF file of type {kind!r}, not of a model: give the model's")
    name = str(file.metadata.get("general.architecture", ""))
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{file.path}: GGUF architecture {name!r} is not among {', '.join(ARCHITECTURES)}: {_ELSEWHERE}"
        )
    return name


def gguf_config(file: GgufFile) -> "PreTrainedConfig":
    """The configuration, of the model_type that the architecture has in transformers.

    Raises UnsupportedModelError for an architecture, a scaling of the rotary embedding or any key of the architecture
    that has no place in it.
    """
    name = architecture_name(file)
    how = ARCHITECTURES[name]
    metadata = {
        key.removeprefix(f"{name}."): value for key, value in file.metadata.items() if key.startswith(f"{name}.")
    }
    values = _values(file, how, metadata)
    read = how.settle(values, metadata) | _rotary(file, how, values, metadata)
    _refuse_unread(file, name, metadata, {*COMMON_KEYS, *how.keys, *read})
    model_type = values.pop("model_type", how.model_type)
    if not hasattr(CONFIG_MAPPING[model_type](), "head_dim"):
        values.pop("head_dim", None)
    check_config(values, str(file.path))
    config: PreTrainedConfig = AutoConfig.for_model(model_type, **values)
    return config


def other_metadata(file: GgufFile) -> list[str]:
    """Keys that belong neither to the model nor to how the file was made."""
    known = (*_GENERAL_PREFIXES, architecture_name(file))
    return [key for key in file.metadata if key.partition(".")[0] not in known]


def _values(file: GgufFile, how: GgufArchitecture, metadata: Mapping[str, Any]) -> Values:
    values: Values = {
        attribute: _scalar(file, key, metadata[key])
        for key, attribute in (COMMON_KEYS | dict(how.keys)).items()
        if metadata.get(key) is not None
    }
    for key, attribute in _TOKEN_IDS.items():
        if (index := file.metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            values[attribute] = index
    if not values.get("sliding_window", True):  # 0: none
        values["sliding_window"] = None
    values |= {attribute: f"blk.0.{tensor}" in file.tensors for tensor, attribute in how.biases.items()}
    values.setdefault("vocab_size", len(file.metadata.get("tokenizer.ggml.tokens", ())))
    values.setdefault("rope_theta", 10000.0)
    values["tie_word_embeddings"] = "output.weight" not in file.tensors
    values["dtype"] = str(_matrix_dtype(file)).removeprefix("torch.")
    return values


def _scalar(file: GgufFile, key: str, value: Any) -> Any:
    if isinstance(value, list):  # a number for each layer
        if len(set(value)) != 1:
            raise UnsupportedModelError(f"{file.path}: {key} is not the same in all layers: {_ELSEWHERE}")
        value = value[0]
    # float32 on file: 1e-05, not 9.999999747378752e-06
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _rotary(file: GgufFile, how: GgufArchitecture, values: Values, metadata: Mapping[str, Any]) -> set[str]:
    """Put the share of a head that is rotated, and factors of the frequencies, into `values`; the keys read."""
    head_dim = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    rotated, width = metadata.get("rope.dimension_count", head_dim), metadata.get("attention.value_length", head_dim)
    if width != head_dim:
        raise UnsupportedModelError(f"{file.path}: values of {width} beside keys of {head_dim} a head: {_ELSEWHERE}")
    if how.rotates_part:
        values["partial_rotary_factor"] = rotated / head_dim
    elif rotated != head_dim:
        raise UnsupportedModelError(f"{file.path} rotates {rotated} of {head_dim} dimensions of a head: {_ELSEWHERE}")
    if ROPE_FACTORS in file.tensors and how.interleaved:
        factors = file.rows(ROPE_FACTORS, np.arange(head_dim // 2)).double().numpy()
        parameters = llama3_parameters(factors, float(values.pop("rope_theta")))
        if parameters is None or "rope_parameters" in values:
            raise UnsupportedModelError(f"{file.path} has {ROPE_FACTORS} that no Llama 3 scaling gives: {_ELSEWHERE}")
        values["rope_parameters"] = parameters
    return {"rope.dimension_count", "attention.value_length"}


def _refuse_unread(file: GgufFile, name: str, metadata: Mapping[str, Any], read: set[str]) -> None:
    for key, value in _unread(metadata, read):
        if key.startswith("rope.scaling"):
            kind = metadata.get("rope.scaling.type")
            what = f"uses rope scaling {kind!r}, which GGUF states too loosely to export"
        else:
            what = f"has {name}.{key} = {str(value)[:40]}, which is not known here"
        raise UnsupportedModelError(f"{file.path} {what}: {_ELSEWHERE}")
    scaled = [tensor for tensor in file.tensors if tensor.startswith("rope_f") and tensor != ROPE_FACTORS]
    if scaled:
        raise UnsupportedModelError(f"{file.path} uses rope factors ({scaled[0]}): {_ELSEWHERE}")


def _unread(metadata: Mapping[str, Any], read: set[str]) -> Iterator[tuple[str, Any]]:
    for key, value in metadata.items():
        neutral = key in DESCRIPTIVE or (key in NEUTRAL and value in NEUTRAL[key])
        if key not in read and not neutral:
            yield key, value


def _matrix_dtype(file: GgufFile) -> torch.dtype:
    return next((tensor.dtype for tensor in file.tensors.values() if len(tensor.shape) > 1), torch.float32)
