"""What the exporter needs to know of a model before it traces it, and what it refuses by name."""

from dataclasses import asdict
from typing import Any

from transformers import PreTrainedConfig

from starling.engine.bundle.manifest import Architecture
from starling.engine.errors import UnsupportedModelError, UserError

#: Positions of a bundle unless more are asked for: a rotary table of a head of 128 takes 64 MiB for these, and some
#: models promise a million or ten.
MOST_POSITIONS = 2**17
#: What the comparison with PyTorch takes at least.
LEAST_POSITIONS = 64


def positions_of(config: PreTrainedConfig, wanted: int | None = None) -> int:
    """The longest sequence of a bundle: `wanted`, by default the model's own, up to MOST_POSITIONS.

    Raises UserError where the model has fewer than `wanted`, or `wanted` is below LEAST_POSITIONS.
    """
    most: int = config.max_position_embeddings
    if wanted is not None and not LEAST_POSITIONS <= wanted <= most:
        problem = f"max_positions is {wanted}, but this model has {most} positions"
        raise UserError(problem, detail=f"give {LEAST_POSITIONS} to {most} (--max-positions)", field="max_positions")
    return min(most, MOST_POSITIONS) if wanted is None else wanted


def architecture_json(arch: Architecture) -> dict[str, Any]:
    """The `architecture` object of bundle.json; Bundle.open reads it back."""
    fields = asdict(arch)
    fields["class"] = fields.pop("class_name")
    return fields


def check_supported(config: PreTrainedConfig) -> None:
    """Refuse, before any work, what would be traced without an error but exported wrong.

    Raises:
        UnsupportedModelError: the configuration lacks a decoder's fields.
    """
    for field in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
        if not isinstance(getattr(config, field, None), int):
            raise UnsupportedModelError(
                f"{config.model_type}: its configuration has no {field}; only decoders with attention are supported"
            )
