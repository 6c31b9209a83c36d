"""Hugging Face folders as checkpoints: config.json, weights, tokenizer files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from starling.engine.errors import CheckpointError, UnsupportedModelError, one_line
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.checkpoints.config_bounds import check_config, check_layers
from starling.export.checkpoints.model_class import SCORING, scores_texts
from starling.export.checkpoints.packed.packing_settings import read_packing
from starling.export.checkpoints.scoring_models import as_scoring_model, has_value_head, pooling_of
from starling.export.checkpoints.stored_tensors import open_safetensors
from starling.export.tokenizers.tokenizer_files import check_has_tokenizer, read_json, read_tokenizer_files

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from starling.export.checkpoints.checkpoint import StoredTensors

ADAPTER_FILE = "adapter_config.json"
#: Where AutoGPTQ had its settings before transformers read them.
OLD_SETTINGS_FILE = "quantize_config.json"


def open_folder(folder: Path, *, kind: str, name: str) -> Checkpoint:
    """Open a folder as `save_pretrained` writes it; `kind` and `name` are what the Checkpoint will say.

    Raises CheckpointError (a file missing, truncated or altered; weights as a pickle only) and UnsupportedModelError
    (an architecture that transformers does not have, weights that are quantized by a method that cannot be read, or
    that have no place).
    """
    from starling.export.checkpoints.packed.packed_tensors import PackedTensors, PlacedPacking
    from starling.export.checkpoints.placement import place  # with PyTorch

    config = read_config(folder)
    packing = read_packing(_config_values(folder), str(folder))
    files = open_safetensors(folder, getattr(config, "transformers_weights", None))
    packed = None if packing is None else PackedTensors(files, packing)
    stored = files if packed is None else packed
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    check_layers(layers, len(stored.names()), str(files.file))
    where, value_head = str(files.file), has_value_head(stored, config)
    unused: tuple[str, ...] = ()
    tensors: StoredTensors = stored
    if value_head and packed is not None:
        raise UnsupportedModelError(
            f"{folder} has a value head on quantized weights: export the unquantized checkpoint"
        )
    if value_head:
        tensors, config, unused = as_scoring_model(stored, config, where)
    placed = place(tensors, config, where)
    generation = read_json(folder / "generation_config.json", missing={})
    tokenizer = read_tokenizer_files(folder, placed.config, generation)
    scores = scores_texts(placed.config)
    return Checkpoint(
        kind,
        name,
        placed.config,
        placed.tensors,
        tokenizer,
        generation,
        path=folder,
        notes=placed.notes + _unused_note(unused) + (() if packed is None else packed.notes),
        left_out=placed.left_out + unused + (() if packed is None else packed.left_out),
        task="score" if scores else "generate",
        pooling=pooling_of(placed.config, tokenizer, value_head=value_head) if scores else None,
        packed=None if packed is None else PlacedPacking(placed.tensors, packed.weights),
        scheme=None if packed is None else packed.scheme,
    )


def _unused_note(unused: tuple[str, ...]) -> tuple[str, ...]:
    return (f"left out: {len(unused)} tensors that no score depends on, such as {unused[0]}",) if unused else ()


def check_folder(folder: Path) -> None:
    """Raise what `open_folder` raises, as far as it shows without PyTorch: config.json, weights' headers, tokenizer."""
    values = _config_values(folder)
    named = values.get("transformers_weights")
    open_safetensors(folder, named if named is None else str(named))
    check_has_tokenizer(folder)


def check_no_adapter(folder: Path) -> None:
    """Raise UnsupportedModelError where the folder is, or holds, an adapter (LoRA and the like) of a model."""
    if not (folder / ADAPTER_FILE).is_file():
        return
    values = read_json(folder / ADAPTER_FILE)
    kind, base = values.get("peft_type", "PEFT"), values.get("base_model_name_or_path")
    whose = f" of {base}" if isinstance(base, str) and base else ""
    is_alone = not (folder / "config.json").is_file()
    what = f"is a {kind} adapter{whose}, not a model" if is_alone else f"holds a {kind} adapter{whose} beside the model"
    raise UnsupportedModelError(
        f"{folder} {what} ({ADAPTER_FILE}): merge it into the model (peft: merge_and_unload, then save_pretrained) "
        "and export the result"
    )


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
    return without_packing(config)


def packing_settings(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The quantization_config of `config`, or of its part for text; None where nothing is quantized."""
    parts = (config, config.get_text_config(decoder=True))
    return next((found for each in parts if (found := getattr(each, "quantization_config", None))), None)


def without_packing(config: PreTrainedConfig) -> PreTrainedConfig:
    """`config`, which no longer says that the weights are quantized: who reads them has dequantized them."""
    for each in (config, config.get_text_config(decoder=True)):
        if hasattr(each, "quantization_config"):
            del each.quantization_config
    return config


def _config_values(folder: Path) -> dict[str, Any]:
    values = read_json(folder / "config.json")
    check_config(values, str(folder / "config.json"))
    if read_packing(values, str(folder)) is None and (folder / OLD_SETTINGS_FILE).is_file():
        raise UnsupportedModelError(
            f"{folder} has a {OLD_SETTINGS_FILE}, but its config.json no quantization_config: write what the one says "
            'into the other, with "quant_method": "gptq"'
        )
    _refuse_other_tasks(folder, values.get("architectures"))
    return values


def _refuse_other_tasks(folder: Path, architectures: Any) -> None:
    """Refuse a class with a head for neither tokens nor scores; a base model without one may be a language model's."""
    for name in architectures if isinstance(architectures, list) else ():
        _, found, task = str(name).partition("For")
        if found and not task.endswith(("CausalLM", "ConditionalGeneration", "SequenceClassification")):
            raise UnsupportedModelError(
                f"{folder} is a {name}, which gives neither a next token nor a score of the text: *ForCausalLM and "
                f"*{SCORING} are exported"
            )
