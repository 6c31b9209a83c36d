"""Stored tensors for which the model has no place: harmless ones get a note, others are refused by name."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from starling.engine.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from starling.export.checkpoints.checkpoint import StoredTensors

# Tables and masks that models make themselves; older releases of transformers saved them.
_MADE_BY_THE_MODEL = re.compile(
    r"(^|\.)(inv_freq|(cos|sin)_cached|masked_bias|position_ids|embeddings\.position_ids|_extra_state)$"
)
_MASK = re.compile(r"(^|\.)(attn|attention|self_attn|self_attention)\.bias$")  # [1, 1, positions, positions]

# What belongs to quantized weights, whole numbers too, which are no tables.
_QUANTIZED = re.compile(
    r"weight_scale|input_scale|qweight|qzeros|g_idx|absmax|quant_map|quant_state|weight_packed|SCB$|scale_inv|zero_point"
)

# What a tensor's name says of where it comes from, and what to do then.
_ADVICE = (
    (
        r"lora_|\.base_layer\.|\.modules_to_save\.|adapter|ia3_l|hada_|oft_",
        "merge the adapter into the model first (peft: merge_and_unload, then save_pretrained)",
    ),
    (
        r"(^|\.)(score|v_head|value_head|reward_head|classifier|classification_head|qa_outputs|regression_head)\.",
        "config.json is a language model's, this is a head for scores: name its *ForSequenceClassification class in "
        "architectures",
    ),
    (
        _QUANTIZED.pattern,
        "the weights are quantized in a way that config.json does not say: export the unquantized checkpoint",
    ),
    (r"bias$", "config.json denies this bias, or is of another model"),
)
_OTHERWISE = "config.json is of another model, or the file holds more than a language model"


def judge(names: list[str], stored: StoredTensors, model: PreTrainedModel, where: str) -> list[str]:
    """Notes on the stored tensors `names`, for which `model` has no place.

    Raises UnsupportedModelError for one that the model's output may depend on.
    """
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    buffers, by_transformers, zeros, lost = [], [], [], []
    for name in names:
        if _is_buffer(name, stored):
            buffers.append(name)
        elif any(pattern.search(name) for pattern in ignored):
            by_transformers.append(name)
        elif _is_zero_bias(name, stored):  # GPTQ's writers give each weight one
            zeros.append(name)
        else:
            lost.append(name)
    if lost:
        what = f"{len(lost)} tensors, such as {lost[0]}" if len(lost) > 1 else f"tensor {lost[0]}"
        advice = next((then for pattern, then in _ADVICE if re.search(pattern, lost[0])), _OTHERWISE)
        raise UnsupportedModelError(f"{where}: {type(model).__name__} has no place for {what}: {advice}")
    said = (
        (buffers, "that the model makes itself"),
        (by_transformers, "that transformers ignores too"),
        (zeros, "that are biases of zeros"),
    )
    return [f"left out: {len(some)} tensors {what}, such as {some[0]}" for some, what in said if some]


def _is_zero_bias(name: str, stored: StoredTensors) -> bool:
    shape = stored.shape(name)
    return name.endswith(".bias") and len(shape) == 1 and not bool(stored.rows(name, 0, shape[0]).any())


def _is_buffer(name: str, stored: StoredTensors) -> bool:
    if _MADE_BY_THE_MODEL.search(name) or not (stored.is_floating(name) or _QUANTIZED.search(name)):
        return True
    return bool(_MASK.search(name)) and len(stored.shape(name)) > 2
