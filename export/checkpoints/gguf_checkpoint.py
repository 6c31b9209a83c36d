"""GGUF files as checkpoints: llama.cpp's names, keys and row order turned back into transformers' own."""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, MODEL_ARCH_NAMES, GGMLQuantizationType, get_tensor_name_map

from starling.engine.errors import CheckpointError, StarlingError, UnsupportedModelError, one_line
from starling.export.checkpoints.checkpoint import Checkpoint, Skeleton, check_tensors, skeleton_of
from starling.export.checkpoints.config_bounds import check_layers
from starling.export.checkpoints.gguf_architectures import ARCHITECTURES
from starling.export.checkpoints.gguf_config import architecture_name, gguf_config, other_metadata
from starling.export.checkpoints.gguf_file import INTEGER_BITS, PLAIN_TYPES, GgufFile
from starling.export.checkpoints.gguf_rope import ROPE_FACTORS
from starling.export.checkpoints.stored_grid import StoredGrid, StoredRows
from starling.export.tokenizers.gguf_tokenizer import gguf_tokenizer_files

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def open_gguf_checkpoint(file: GgufFile, *, name: str) -> Checkpoint:
    """Open a `.gguf` file of any quantization that the package gguf can dequantize.

    Raises CheckpointError (a tensor missing, a value of the wrong type) and UnsupportedModelError (an architecture,
    rope scaling or pre-tokenizer that cannot be read faithfully).
    """
    try:
        config = gguf_config(file)
        tokenizer = gguf_tokenizer_files(file.metadata, config.vocab_size, where=str(file.path))
    except StarlingError:
        raise
    except Exception as error:  # a value of another type than its key's, or out of range
        raise CheckpointError(f"{file.path}: its metadata cannot be used: {one_line(error)}") from error
    check_layers(config.num_hidden_layers, len(file.tensors), str(file.path))
    skeleton = skeleton_of(config)
    tensors = GgufTensors(file, config, skeleton)
    check_tensors(tensors, skeleton, str(file.path))
    config.architectures = [skeleton.class_name]
    generation = {"bos_token_id": tokenizer.bos, "eos_token_id": list(tokenizer.eos), "pad_token_id": tokenizer.pad}
    notes = [f"the file's {key} has no place in a bundle and was left out" for key in other_metadata(file)]
    return Checkpoint(
        "gguf", name, config, tensors, tokenizer, generation, path=file.path, notes=tuple(notes), packed=tensors
    )


class GgufTensors:
    """A TensorSource and a PackedSource over a GGUF file: float32 for quantized tensors, else the stored dtype."""

    def __init__(self, file: GgufFile, config: "PreTrainedConfig", skeleton: Skeleton) -> None:
        self._file = file
        self._how = ARCHITECTURES[architecture_name(file)]
        self._heads = {".attn_q.": config.num_attention_heads, ".attn_k.": config.num_key_value_heads}
        self._stored = _names_on_file(file, config, skeleton)

    def names(self) -> Collection[str]:
        """See TensorSource."""
        return self._stored.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """See TensorSource."""
        return self._file.tensors[self._stored[name]].shape

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See TensorSource."""
        stored = self._stored[name]
        values = self._file.rows(stored, self._order(stored)[start:stop])
        if self._how.norm_plus_one and stored.endswith("norm.weight"):
            return values - 1
        return values

    def packing(self, name: str) -> str | None:
        """See PackedSource."""
        kind = self._kind(name)
        return None if kind in PLAIN_TYPES else kind.name

    def grid(self, name: str) -> StoredGrid | None:
        """See PackedSource."""
        bits = INTEGER_BITS.get(self._kind(name))
        if bits is None or len(self.shape(name)) != 2:
            return None
        group = GGML_QUANT_SIZES[self._kind(name)][0]
        return StoredGrid(bits, group, 2 ** (bits - 1), frozenset((torch.float16, torch.float32)))

    def stored_rows(self, name: str, start: int, stop: int) -> StoredRows:
        """See PackedSource."""
        stored = self._stored[name]
        whole, scales = self._file.integers(stored, self._order(stored)[start:stop])
        zero = 2 ** (INTEGER_BITS[self._kind(name)] - 1)
        return StoredRows(whole + zero, scales, torch.full(scales.shape, zero, dtype=torch.int16))

    def _kind(self, name: str) -> GGMLQuantizationType:
        return self._file.tensors[self._stored[name]].kind

    def _order(self, stored: str) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Row i for transformers is row order[i] on file, where pairs of each head's halves of q and k lie together."""
        rows = np.arange(self._file.tensors[stored].shape[0])
        heads = next((count for part, count in self._heads.items() if part in stored), None)
        if not self._how.interleaved or heads is None:
            return rows
        return rows.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _names_on_file(file: GgufFile, config: "PreTrainedConfig", skeleton: Skeleton) -> dict[str, str]:
    """transformers' name -> name on file, by the name map of the package gguf."""
    name = architecture_name(file)
    architecture = next(key for key, text in MODEL_ARCH_NAMES.items() if text == name)
    name_map = get_tensor_name_map(architecture, config.num_hidden_layers)
    names = {}
    for wanted in skeleton.shapes:
        stem, dot, leaf = wanted.rpartition(".")
        known = name_map.get_name(stem)
        stored = f"{known}{dot}{leaf}"
        if known is not None and stored in file.tensors:
            names[wanted] = stored
    unknown = sorted(set(file.tensors) - set(names.values()) - {ROPE_FACTORS})
    if unknown:
        raise UnsupportedModelError(
            f"{file.path} has tensor {unknown[0]}, for which a {config.model_type} model has no place: "
            "export the Hugging Face folder instead"
        )
    return names
