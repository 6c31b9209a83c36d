"""A tiny configuration of any model type of transformers, with each of its kinds of layers in it."""

from collections.abc import Iterator
from typing import Any

from families import SMALL
from transformers import AutoConfig, PreTrainedConfig

#: Sizes by the names that configurations have for them; one that a configuration does not know is left out.
SIZES: dict[str, Any] = SMALL | {
    "sliding_window": 9,
    # other names for them
    "n_embd": 64,
    "d_model": 64,
    "n_inner": 96,
    "ffn_dim": 96,
    "ffn_hidden_size": 96,
    "word_embed_proj_dim": 64,
    "n_head": 4,
    "n_heads": 4,
    "n_layer": 3,
    "n_layers": 3,
    "num_layers": 3,
    "n_positions": 128,
    "n_ctx": 128,
    "max_seq_len": 128,
    "rotary_dim": 16,
    # mixtures of experts
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "expert_ffn_hidden_size": 32,
    # low-rank keys and values
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    # per-layer inputs and states
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 32002,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
}
#: Lists with an entry a layer.
PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type")
#: Keys and values of low rank: as many heads of each, and the size of a head is that of its rotary part.
LOW_RANK = {"num_key_value_heads": 4, "head_dim": 16}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
#: What the defaults of a type do not show, or sizes that only fit together.
OPTIONS: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "phi": {"num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "stablelm": {"partial_rotary_factor": 0.25},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 1},
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3_text": {"query_pre_attn_scalar": 32},
    "vaultgemma": {"query_pre_attn_scalar": 32},
    "hunyuan_v1_dense": {"head_dim": 32, "rope_parameters": DEFAULT_ROPE},
    "hunyuan_v1_moe": {"head_dim": 32, "rope_parameters": DEFAULT_ROPE, "moe_topk": 2},
    "ministral": {"head_dim": 32},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "head_dim": 32},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "zaya": {"num_experts_per_tok": 1},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), DEFAULT_ROPE)},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "window_size": 9},
    "deepseek_v2": LOW_RANK | {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    **dict.fromkeys(
        ("axk1", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "glm4_moe_lite", "longcat_flash"),
        LOW_RANK,
    ),
}
#: What is left out, one set after the other, until a model can be made and run: sizes that do not fit its defaults.
_LEFT_OUT: tuple[frozenset[str], ...] = (
    frozenset(),
    frozenset({"head_dim"}),
    frozenset({*PER_LAYER}),
    frozenset({*PER_LAYER, "head_dim"}),
    frozenset({*PER_LAYER, "head_dim", "num_key_value_heads"}),
    frozenset({*PER_LAYER, "head_dim", "num_key_value_heads", "num_hidden_layers"}),
    frozenset({*PER_LAYER, "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"}),
)


def tiny_configs(model_type: str) -> Iterator[PreTrainedConfig | Exception]:
    """Configurations to try one after the other, the nearest to SIZES first; what stood against one in its place."""
    for left_out in _LEFT_OUT:
        try:
            yield _tiny(model_type, left_out)
        except Exception as error:
            yield error


def _tiny(model_type: str, left_out: frozenset[str]) -> PreTrainedConfig:
    base = AutoConfig.for_model(model_type)
    text = base.get_text_config()
    settings = _sizes(text, left_out) | OPTIONS.get(model_type, {})
    if text is base:
        return AutoConfig.for_model(model_type, **settings)
    return type(text)(**settings)


def _sizes(base: PreTrainedConfig, left_out: frozenset[str]) -> dict[str, Any]:
    always = ("num_key_value_heads", "hidden_size")
    known = {
        name: value
        for name, value in SIZES.items()
        if name not in left_out and hasattr(base, name) and (getattr(base, name) is not None or name in always)
    }
    computed = {name for name in (*PER_LAYER, "head_dim") if isinstance(getattr(type(base), name, None), property)}
    known = {name: value for name, value in known.items() if name not in computed}
    for name in PER_LAYER:
        if name not in left_out | computed and (kinds := list(dict.fromkeys(getattr(base, name, None) or ()))):
            known[name] = (kinds * 3)[:3] if len(kinds) < 3 else kinds[:3]
    if rope := getattr(base, "rope_parameters", None):
        known["rope_parameters"] = rope | DEFAULT_ROPE if rope.get("rope_theta", 1.0) is None else rope
    return known
