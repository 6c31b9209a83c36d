"""GGUF files as checkpoints: llama.cpp's names, keys and row order turned back into transformers' own."""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING as UNTYPED_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, LlamaTensorProcessor

from starling.engine.errors import CheckpointError, UnsupportedModelError, one_line
from starling.export.checkpoints.checkpoint import Checkpoint, check_tensors, skeleton_of
from starling.export.checkpoints.gguf_file import GgufFile
from starling.export.tokenizers.gguf_tokenizer import gguf_tokenizer_files

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

GGUF_CONFIG_MAPPING = cast(dict[str, dict[str, str | None]], UNTYPED_CONFIG_MAPPING)
# Architectures whose tensors need at most their rows put back in order, and whose every key is understood.
ARCHITECTURES = ("llama", "phi3", "qwen2", "qwen3")


def open_gguf_checkpoint(file: GgufFile, *, name: str) -> Checkpoint:
    """Open a `.gguf` file of any quantization that the package gguf can dequantize.

    Raises CheckpointError (a tensor missing, a value of the wrong type) and UnsupportedModelError (an architecture,
    rope scaling or pre-tokenizer that cannot be read faithfully).
    """
    try:
        config = gguf_config(file)
        tokenizer = gguf_tokenizer_files(file.metadata, config.vocab_size, where=str(file.path))
    except (TypeError, ValueError, LookupError, AttributeError, StrictDataclassError) as error:
        # A value of another type than its key's.
        raise CheckpointError(f"{file.path}: its metadata cannot be used: {one_line(error)}") from error
    tensors = GgufTensors(file, config)
    config.architectures = [check_tensors(tensors, config, str(file.path)).class_name]
    generation = {"bos_token_id": tokenizer.bos, "eos_token_id": list(tokenizer.eos), "pad_token_id": tokenizer.pad}
    return Checkpoint("gguf", name, config, tensors, tokenizer, generation)


def gguf_config(file: GgufFile) -> "PreTrainedConfig":
    """The transformers configuration that the file's metadata describes, by transformers' own table of keys.

    Raises UnsupportedModelError for an architecture or a rope scaling that this reader does not know.
    """
    architecture = _architecture(file)
    values = _config_values(file, architecture)
    _refuse_rope_scaling(file, architecture)
    window = file.metadata.get(f"{architecture}.attention.sliding_window")
    if window:  # transformers' table leaves it out
        values["sliding_window"] = window
    values.setdefault("vocab_size", len(file.metadata.get("tokenizer.ggml.tokens", ())))
    values["tie_word_embeddings"] = "output.weight" not in file.tensors
    values["dtype"] = str(_matrix_dtype(file)).removeprefix("torch.")
    config = AutoConfig.for_model(architecture, **values)
    _refuse_partial_rotary(file, config)
    return config


def _architecture(file: GgufFile) -> str:
    architecture = str(file.metadata.get("general.architecture", ""))
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{file.path}: GGUF architecture {architecture!r} is not among {', '.join(ARCHITECTURES)}: "
            "export the Hugging Face folder instead"
        )
    return architecture


def _config_values(file: GgufFile, architecture: str) -> dict[str, Any]:
    values = {}
    for prefix, table in ((architecture, GGUF_CONFIG_MAPPING[architecture]), ("tokenizer", _TOKEN_IDS)):
        for key, attribute in table.items():
            value = file.metadata.get(f"{prefix}.{key}")
            if attribute is not None and value is not None:
                # float32 on file: 1e-05, not 9.999999747378752e-06
                values[attribute] = float(str(np.float32(value))) if isinstance(value, float) else value
    key_length = file.metadata.get(f"{architecture}.attention.key_length")
    if key_length is not None and hasattr(CONFIG_MAPPING[architecture](), "head_dim"):
        values["head_dim"] = key_length
    return values


_TOKEN_IDS = {key: name for key, name in GGUF_CONFIG_MAPPING["tokenizer"].items() if name != "unk_token_id"}


def _refuse_rope_scaling(file: GgufFile, architecture: str) -> None:
    kind = file.metadata.get(f"{architecture}.rope.scaling.type", "none")
    scaled = [name for name in file.tensors if name.startswith("rope_f")]  # rope_freqs, rope_factors_long/short
    if kind != "none" or scaled:
        what = f"rope scaling {kind!r}" if kind != "none" else f"rope factors ({scaled[0]})"
        raise UnsupportedModelError(
            f"{file.path} uses {what}, which GGUF states too loosely to export: export the Hugging Face folder instead"
        )


def _refuse_partial_rotary(file: GgufFile, config: "PreTrainedConfig") -> None:
    rotated = file.metadata.get(f"{config.model_type}.rope.dimension_count")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if rotated not in (None, head_dim):
        raise UnsupportedModelError(
            f"{file.path} rotates {rotated} of {head_dim} dimensions of a head: export the Hugging Face folder instead"
        )


def _matrix_dtype(file: GgufFile) -> torch.dtype:
    return next((tensor.dtype for tensor in file.tensors.values() if len(tensor.shape) > 1), torch.float32)


class GgufTensors:
    """A TensorSource over a GGUF file: float32 for quantized tensors, the stored dtype for the others."""

    def __init__(self, file: GgufFile, config: "PreTrainedConfig") -> None:
        self._file = file
        self._undo = LlamaTensorProcessor(config=config.to_dict())  # type: ignore[no-untyped-call]
        self._permuted = TENSOR_PROCESSORS.get(config.model_type) is LlamaTensorProcessor
        self._stored = _names_on_file(file, config)

    def names(self) -> Collection[str]:
        """See TensorSource."""
        return self._stored.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """See TensorSource."""
        return self._file.tensors[self._stored[name]].shape

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See TensorSource."""
        stored = self._stored[name]
        return self._file.rows(stored, self._order(stored)[start:stop])

    def _order(self, stored: str) -> np.ndarray[Any, np.dtype[np.int64]]:
        # Row i for transformers is row order[i] on file, as llama.cpp interleaves the halves of each head of q and k:
        # transformers' own inverse, run on the row numbers instead of the rows.
        rows = np.arange(self._file.tensors[stored].shape[0])
        if not self._permuted:
            return rows
        order: np.ndarray[Any, np.dtype[np.int64]] = self._undo.process(rows, stored).weights  # type: ignore[no-untyped-call]
        return order


def _names_on_file(file: GgufFile, config: "PreTrainedConfig") -> dict[str, str]:
    """transformers' name -> name on file, by the name map of the package gguf."""
    architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == config.model_type)
    name_map = get_tensor_name_map(architecture, config.num_hidden_layers)
    names = {}
    for name in skeleton_of(config).shapes:
        stem, dot, leaf = name.rpartition(".")
        stored = f"{name_map.get_name(stem)}{dot}{leaf}"
        if stored in file.tensors:
            names[name] = stored
    unknown = sorted(set(file.tensors) - set(names.values()))
    if unknown:
        raise UnsupportedModelError(
            f"{file.path} has tensor {unknown[0]}, for which a {config.model_type} model has no place: "
            "export the Hugging Face folder instead"
        )
    return names
