"""The architectures of GGUF that are read: one table of keys, and of what llama.cpp's converter did to the values.

Keys and changes are those of llama.cpp's convert_hf_to_gguf.py; what an architecture's file does not state (a query
scale, a rotary base) is what llama.cpp's own model code assumes of it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

#: Values of a configuration by attribute, as they are made of the metadata.
Values = dict[str, Any]

# Keys, without the architecture before them, that mean the same everywhere.
COMMON_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "vocab_size": "vocab_size",
    "rope.freq_base": "rope_theta",
}
RMS_EPSILON = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
# Keys that change nothing where they have this value; with another one the file is refused.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scaling.type": ("none",),
    "tensor_data_layout": ("Meta AI original pth",),
}
# Keys that say how the model came to be, or that another key or a tensor says better.
DESCRIPTIVE = frozenset({"rope.scaling.finetuned", "rope.scaling.original_context_length"})


@dataclass(frozen=True, slots=True)
class GgufArchitecture:
    """How files of one architecture are read.

    `keys` go beside COMMON_KEYS; `biases` are attributes that the first layer's tensor switches on; `interleaved`: rows
    of q and k are stored as pairs of each head's halves; `norm_plus_one`: norms are stored plus 1; `rotates_part`:
    rope.dimension_count may be less than a head; `settle(values, metadata)` sets what no single key says, from
    metadata without the architecture's prefix, and returns the keys that it has read.
    """

    model_type: str
    keys: Mapping[str, str] = field(default_factory=dict)
    biases: Mapping[str, str] = field(default_factory=dict)
    interleaved: bool = False
    norm_plus_one: bool = False
    rotates_part: bool = False
    settle: Callable[[Values, Mapping[str, Any]], set[str]] = lambda values, metadata: set()


def _llama(values: Values, metadata: Mapping[str, Any]) -> set[str]:
    if values.get("sliding_window"):  # Llama's configuration has no window; Mistral is Llama with one
        values["model_type"] = "mistral"
    return _linear_scaling(values, metadata)


def _linear_scaling(values: Values, metadata: Mapping[str, Any]) -> set[str]:
    if metadata.get("rope.scaling.type") != "linear" or "rope.scaling.factor" not in metadata:
        return set()
    rope = {"rope_type": "linear", "factor": float(metadata["rope.scaling.factor"])}
    values["rope_parameters"] = {**rope, "rope_theta": values.pop("rope_theta", 10000.0)}
    return {"rope.scaling.type", "rope.scaling.factor"}


def _gemma2(values: Values, metadata: Mapping[str, Any]) -> set[str]:
    values["query_pre_attn_scalar"] = _gemma_query_scale(values, layers_of_27b=46)
    return set()


def _gemma3(values: Values, metadata: Mapping[str, Any]) -> set[str]:
    """A rotary base for each kind of layer, and which layers see a window."""
    values["query_pre_attn_scalar"] = _gemma_query_scale(values, layers_of_27b=62)
    read = _linear_scaling(values, metadata)
    theta = values.pop("rope_theta", 1_000_000.0)
    full = values.pop("rope_parameters", {"rope_type": "default", "rope_theta": theta})
    sliding = {"rope_type": "default", "rope_theta": float(metadata.get("rope.freq_base_swa", 10000.0))}
    values["rope_parameters"] = {"full_attention": full, "sliding_attention": sliding}
    pattern = metadata.get("attention.sliding_window_pattern", 6 if values.get("sliding_window") else 1)
    layers = range(values["num_hidden_layers"])
    slides = [bool((i + 1) % pattern) for i in layers] if isinstance(pattern, int) else [bool(s) for s in pattern]
    values["layer_types"] = ["sliding_attention" if window else "full_attention" for window in slides]
    return read | {"rope.freq_base_swa", "attention.sliding_window_pattern"}


def _gemma_query_scale(values: Values, *, layers_of_27b: int) -> int:
    # No key states it; llama.cpp takes the width of a head, but for the models of 27B, known by their layers.
    if values["num_hidden_layers"] == layers_of_27b:
        return int(values["hidden_size"] // values["num_attention_heads"])
    return int(values["head_dim"])


def _granite(values: Values, metadata: Mapping[str, Any]) -> set[str]:
    head_dim = values["hidden_size"] / values["num_attention_heads"]
    values.setdefault("attention_multiplier", head_dim**-0.5)  # transformers would take 1
    return _linear_scaling(values, metadata)


def _stablelm(values: Values, metadata: Mapping[str, Any]) -> set[str]:
    values["use_parallel_residual"] = bool(metadata.get("use_parallel_residual", False))
    return {"use_parallel_residual"}


_WINDOW = {"attention.sliding_window": "sliding_window"}
_EPSILON = "attention.layer_norm_epsilon"
_SOFT_CAPS = {name: name for name in ("attn_logit_softcapping", "final_logit_softcapping")}
_GRANITE_SCALES = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
_ATTENTION_BIAS = {"attn_q.bias": "attention_bias"}
_LLAMA_BIASES = _ATTENTION_BIAS | {"ffn_gate.bias": "mlp_bias"}

#: general.architecture -> how it is read.
ARCHITECTURES: Mapping[str, GgufArchitecture] = {
    "gemma": GgufArchitecture("gemma", RMS_EPSILON, _ATTENTION_BIAS, norm_plus_one=True),
    "gemma2": GgufArchitecture(
        "gemma2", RMS_EPSILON | _WINDOW | _SOFT_CAPS, _ATTENTION_BIAS, norm_plus_one=True, settle=_gemma2
    ),
    "gemma3": GgufArchitecture(
        "gemma3_text", RMS_EPSILON | _WINDOW, _ATTENTION_BIAS, norm_plus_one=True, settle=_gemma3
    ),
    "granite": GgufArchitecture(
        "granite", RMS_EPSILON | _GRANITE_SCALES, _LLAMA_BIASES, interleaved=True, settle=_granite
    ),
    "llama": GgufArchitecture("llama", RMS_EPSILON | _WINDOW, _LLAMA_BIASES, interleaved=True, settle=_llama),
    "olmo2": GgufArchitecture("olmo2", RMS_EPSILON, _ATTENTION_BIAS),
    "phi2": GgufArchitecture("phi", {_EPSILON: "layer_norm_eps"}, rotates_part=True),
    "phi3": GgufArchitecture("phi3", RMS_EPSILON | _WINDOW, rotates_part=True),
    "qwen2": GgufArchitecture("qwen2", RMS_EPSILON, settle=_linear_scaling),
    "qwen3": GgufArchitecture("qwen3", RMS_EPSILON, _ATTENTION_BIAS, settle=_linear_scaling),
    "stablelm": GgufArchitecture(
        "stablelm", {_EPSILON: "layer_norm_eps"}, {"attn_q.bias": "use_qkv_bias"}, rotates_part=True, settle=_stablelm
    ),
    "starcoder2": GgufArchitecture("starcoder2", {_EPSILON: "norm_epsilon"} | _WINDOW, {"attn_q.bias": "use_bias"}),
}
