"""Hugging Face folders as checkpoints: config.json, safetensors (sharded or not), tokenizer files."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from starling.engine.errors import CheckpointError, UnsupportedModelError, one_line
from starling.export.checkpoints.checkpoint import Checkpoint, check_tensors
from starling.export.checkpoints.config_bounds import check_config
from starling.export.tokenizers.tokenizer_files import check_has_tokenizer, read_json, read_tokenizer_files

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = ("F32", "F16", "BF16")


def open_folder(folder: Path, *, kind: str, name: str) -> Checkpoint:
    """Open a folder as `save_pretrained` writes it; `kind` and `name` are what the Checkpoint will say.

    Raises CheckpointError (a file missing, truncated or altered; weights as a pickle only) and UnsupportedModelError
    (an architecture that transformers does not have, or weights that are already quantized).
    """
    config = read_config(folder)
    tensors = open_safetensors(folder)
    check_tensors(tensors, config, str(folder / (INDEX_FILE if (folder / INDEX_FILE).is_file() else SINGLE_FILE)))
    generation = read_json(folder / "generation_config.json", missing={})
    tokenizer = read_tokenizer_files(folder, config, generation)
    return Checkpoint(kind, name, config, tensors, tokenizer, generation)


def check_folder(folder: Path) -> None:
    """Raise what `open_folder` raises, as far as it shows without PyTorch: config.json, weights' headers, tokenizer."""
    _config_values(folder)
    open_safetensors(folder)
    check_has_tokenizer(folder)


def read_config(folder: Path) -> PreTrainedConfig:
    """config.json as the configuration class of its model_type; code in the folder is never run.

    Raises CheckpointError and UnsupportedModelError as `open_folder` does.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    model_type = _config_values(folder).get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise UnsupportedModelError(f"{folder}: model_type {model_type!r} is unknown to this transformers")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a class computes with the settings before it looks at them
        raise CheckpointError(f"{folder / 'config.json'} cannot be used: {one_line(error)}") from error
    return config


def _config_values(folder: Path) -> dict[str, Any]:
    values = read_json(folder / "config.json")
    check_config(values, str(folder / "config.json"))
    if values.get("quantization_config"):
        settings = values["quantization_config"]
        method = settings.get("quant_method", "some method") if isinstance(settings, dict) else settings
        raise UnsupportedModelError(f"{folder} is quantized already ({method}): export the unquantized checkpoint")
    return values


@dataclass(frozen=True, slots=True)
class _Entry:
    file: Path
    shape: tuple[int, ...]


class SafetensorsFiles:
    """A TensorSource over safetensors files, each opened for one call only, so that no mapped pages pile up."""

    def __init__(self, entries: dict[str, _Entry]) -> None:
        self._entries = entries

    def names(self) -> Collection[str]:
        """See TensorSource."""
        return self._entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """See TensorSource."""
        return self._entries[name].shape

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See TensorSource."""
        with _opened(self._entries[name].file, "pt") as file:
            # A clone: the slice may be a view of the mapped file, which would keep it mapped.
            rows: torch.Tensor = file.get_slice(name)[start:stop].clone()
        return rows


def open_safetensors(folder: Path) -> SafetensorsFiles:
    """Find the weights of a folder and check every header and length.

    Raises CheckpointError naming the file that is missing, truncated or altered; UnsupportedModelError for a dtype
    other than float32, float16 and bfloat16.
    """
    if (folder / INDEX_FILE).is_file():
        return SafetensorsFiles(_indexed_entries(folder))
    if (folder / SINGLE_FILE).is_file():
        return SafetensorsFiles(_entries_of(folder / SINGLE_FILE))
    if any(folder.glob("pytorch_model*.bin")):
        raise CheckpointError(
            f"{folder} has only pytorch_model.bin, a pickle that can run code when read: if you trust it, convert it "
            "with transformers: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    raise CheckpointError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}: give the folder of a whole checkpoint")


def _indexed_entries(folder: Path) -> dict[str, _Entry]:
    index = folder / INDEX_FILE
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map: get the file again")
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index} names {shard!r}, which is not a file name: get the file again")
    shards = {shard: _entries_of(folder / shard) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointError(f"{folder / shard} has no tensor {name}, which {INDEX_FILE} puts there: get it again")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _entries_of(path: Path) -> dict[str, _Entry]:
    entries = {}
    with _opened(path, "np") as file:  # a header is the same to either, and PyTorch takes seconds to load
        for name in file.keys():  # noqa: SIM118 (a safe_open handle is no mapping)
            tensor = file.get_slice(name)
            if tensor.get_dtype() not in DTYPES:
                raise UnsupportedModelError(
                    f"{path}: tensor {name} is {tensor.get_dtype()}, only {', '.join(DTYPES)} can be exported"
                )
            entries[name] = _Entry(path, tuple(tensor.get_shape()))
    return entries


@contextmanager
def _opened(path: Path, framework: str) -> Iterator[Any]:
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: get the whole checkpoint again") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or altered ({error}): get the file again") from error
