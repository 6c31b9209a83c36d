"""Small random models as GGUF files, written as llama.cpp's convert_hf_to_gguf.py lays them out.

What that script does to keys and values is spelt out here a second time, from the script, so that the tests compare
the reader with it and not with itself.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, RopeScalingType, TokenType, get_tensor_name_map
from gguf.quants import quantize
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from starling.export.checkpoints.checkpoint import Checkpoint

VOCABULARY = 300
# model_type -> general.architecture, where the two differ
ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3", "phi": "phi2"}
# LlamaModel and those that inherit it: rows of q and k as pairs of each head's halves.
INTERLEAVED = ("llama", "granite")
# GemmaModel, Gemma2Model, Gemma3Model: "if name.endswith('norm.weight'): data_torch + 1"
PLUS_ONE = ("gemma", "gemma2", "gemma3")
# Their set_gguf_parameters write no rope.freq_base.
WITHOUT_BASE = ("gemma", "gemma2", "phi2", "stablelm")
WITH_HEAD_DIM = ("gemma", "gemma2", "gemma3", "qwen3")


def write_gguf(
    path: Path,
    config: PreTrainedConfig,
    *,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    pre: str = "gpt-2",
    strings: Mapping[str, str] | None = None,
    parts: int = 0,
    tensors: Mapping[str, NDArray[np.float32]] | None = None,
) -> PreTrainedModel:
    """Write a GGUF file of a random model, and return the model; `parts`: tensors in a part, 0 for one file."""
    model = random_model(config)
    name = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = GGUFWriter(path, name, split_max_tensors=parts)
    write_settings(writer, name, config)
    for key, value in (strings or {}).items():
        writer.add_string(key, value)
    write_byte_tokenizer(writer, pre)
    write_tensors(writer, name, model, kind)
    for tensor, values in (tensors or {}).items():
        writer.add_tensor(tensor, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model whose biases and norms are random too, so that none can be mistaken for another."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def head_dim_of(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or int(config.hidden_size // config.num_attention_heads)


def write_settings(writer: GGUFWriter, name: str, config: PreTrainedConfig) -> None:
    """The keys that `set_gguf_parameters` of each class of the script writes."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(config.norm_epsilon if name == "starcoder2" else config.layer_norm_eps)
    if name in WITH_HEAD_DIM or (name == "llama" and getattr(config, "head_dim", None)):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    _write_rotary(writer, name, config)
    _write_scales(writer, name, config)


def _write_rotary(writer: GGUFWriter, name: str, config: PreTrainedConfig) -> None:
    rope = config.rope_parameters
    full = rope.get("full_attention", rope)
    if name not in WITHOUT_BASE:
        writer.add_rope_freq_base(full["rope_theta"])
    if name in ("llama", "granite", "phi2", "phi3", "stablelm"):
        writer.add_rope_dimension_count(int(full.get("partial_rotary_factor", 1) * head_dim_of(config)))
    if full["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(full["factor"])
    if name == "gemma3":
        writer.add_float32(f"{writer.arch}.rope.freq_base_swa", rope["sliding_attention"]["rope_theta"])
        slides = [kind == "sliding_attention" for kind in config.layer_types]
        writer.add_array(f"{writer.arch}.attention.sliding_window_pattern", slides)
    if full["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", rope_factors(full, head_dim_of(config)))


def _write_scales(writer: GGUFWriter, name: str, config: PreTrainedConfig) -> None:
    if name == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if name == "stablelm":
        writer.add_parallel_residual(config.use_parallel_residual)
    if name == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)


def rope_factors(rope: Mapping[str, Any], head_dim: int) -> NDArray[np.float32]:
    """Llama 3's factors [head_dim / 2], one frequency after another, as `generate_extra_tensors` makes them."""
    context, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for pair in range(head_dim // 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (2 * pair / head_dim)
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


def write_tensors(writer: GGUFWriter, name: str, model: PreTrainedModel, kind: GGMLQuantizationType) -> None:
    config = model.config
    architecture = next(key for key, text in MODEL_ARCH_NAMES.items() if text == name)
    names = get_tensor_name_map(architecture, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for tensor_name, tensor in model.state_dict().items():
        stem, _, leaf = tensor_name.rpartition(".")
        if tensor_name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        if name in INTERLEAVED and stem.endswith(("q_proj", "k_proj")):
            values = _interleaved(values, heads[stem.rpartition(".")[2]])
        if name in PLUS_ONE and tensor_name.endswith("norm.weight"):
            values = values + 1
        stored = f"{names.get_name(stem)}.{leaf}"
        if values.ndim == 1:
            writer.add_tensor(stored, values)
        else:
            writer.add_tensor(stored, quantize(values, kind), raw_dtype=kind)


def _interleaved(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """llama.cpp's order of the rows of q and k: a pair of each half of a head side by side."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_byte_tokenizer(writer: GGUFWriter, pre: str) -> None:
    """A vocabulary of all bytes and two merges."""
    letters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    tokens = ["<pad>", "<s>", "</s>", *letters, "12", "ab"]
    unused = VOCABULARY - len(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens + [f"<unused{i}>" for i in range(unused)])
    writer.add_token_types(
        [TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3) + [TokenType.UNUSED] * unused
    )
    writer.add_token_merges(["1 2", "a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)


def rows_of(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """One whole tensor, as the reader gives it."""
    return checkpoint.tensors.rows(name, 0, checkpoint.tensors.shape(name)[0])
