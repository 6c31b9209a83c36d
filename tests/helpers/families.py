"""Small random models of many families, saved as a user's checkpoint would be."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from starling.engine.backends.backend import Backend
from starling.export.checkpoints.checkpoint import Checkpoint, TensorSource
from starling.export.quantization.smoothquant import SmoothedTensors

SMALL: dict[str, Any] = {
    "vocab_size": 32002,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Family:
    """A small configuration of one transformers model type."""

    name: str
    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    dialects: tuple[str, ...] = ("ort", "canonical", "tensorrt")

    def config(self) -> PreTrainedConfig:
        return AutoConfig.for_model(self.model_type, **(SMALL | self.options))


def make_random(model: torch.nn.Module) -> None:
    """Give every weight a part in the result: no zero biases, no norm weights of one, sharp attention."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.ndim > 1 else 0.3))


def random_folder(family: Family, tokenizer: Checkpoint, folder: Path, **options: Any) -> Path:
    """Save a model whose every weight matters; `options` are those of save_pretrained."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family.config(), dtype=torch.float32)
    make_random(model)
    model.save_pretrained(folder, **options)
    (folder / "tokenizer.json").write_text(tokenizer.tokenizer.tokenizer_json, encoding="utf-8")
    return folder


def logits_by_position(backend: Backend, tokens: NDArray[np.int64]) -> dict[int, NDArray[np.float32]]:
    """The logits [vocab] after a prefill of 12 tokens, a chunk of 8 after it, and each decode step."""
    found = {11: backend.prefill(0, tokens[:12], 0).logits()[0].copy()}
    found[19] = backend.prefill(0, tokens[12:20], 12).logits()[0].copy()
    for at in range(20, len(tokens)):
        found[at] = backend.decode([int(tokens[at])], [at]).logits()[0].copy()
    return found


def with_a_spike(checkpoint: Checkpoint, layer: int) -> TensorSource:
    """The same function, with one channel between a layer's norm and its MLP a thousand times as large."""
    divisors = torch.ones(checkpoint.config.hidden_size)
    divisors[5] = 0.001
    mlp = f"model.layers.{layer}.mlp."
    readers = {f"{mlp}{name}_proj.weight": divisors for name in ("gate", "up")}
    norm = {f"model.layers.{layer}.post_attention_layernorm.weight": divisors}
    return SmoothedTensors(checkpoint.tensors, norm, readers)
