"""What the exporter needs to know of a model: what it refuses by name before the trace, its positions and its shape."""

from dataclasses import asdict
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from starling.engine.bundle.model_records import Architecture
from starling.engine.errors import UnsupportedModelError, UserError

#: Positions of a bundle unless more are asked for: a rotary table of a head of 128 takes 64 MiB for these, and some
#: models promise a million or ten.
MOST_POSITIONS = 2**17
#: What the comparison with PyTorch takes at least.
LEAST_POSITIONS = 64
#: What a decoder's configuration has, and what a model is that lacks it.
_FIELDS = {
    "num_attention_heads": "models without attention (state spaces, recurrence) are not supported",
    "max_position_embeddings": "positions by a bias for the distance (ALiBi) or by recurrence are not supported",
    **dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers"), "only decoder language models are supported"),
}


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
    for field, what in _FIELDS.items():
        if not isinstance(getattr(config, field, None), int):
            raise UnsupportedModelError(f"{config.model_type}: its configuration has no {field}: {what}")


def architecture_of(
    model: PreTrainedModel, kv_heads: int, head_dim: int, positions: int, parameters: int, *, tied: bool
) -> Architecture:
    """The shape of a model whose attention was seen to have such heads."""
    config = model.config
    return Architecture(
        model_type=config.model_type,
        class_name=type(model).__name__,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        query_heads=config.num_attention_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        sliding_window=getattr(config, "sliding_window", None),
        max_positions=positions,
        parameters=parameters,
        tied_embeddings=tied,
    )


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Parameters that share a tensor: each name but the first, to the first."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            tied[name] = first[id(parameter)]
        first.setdefault(id(parameter), name)
    return tied
