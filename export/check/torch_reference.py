"""The PyTorch model as the truth: its logits on real text, whole or cut to its first layers."""

import copy

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from starling.export.checkpoints.checkpoint import TensorSource


def cut(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The same configuration with only its first `layers` layers."""
    shorter = copy.deepcopy(config)
    shorter.num_hidden_layers = layers
    if getattr(shorter, "layer_types", None):
        shorter.layer_types = shorter.layer_types[:layers]
    return shorter


def load_reference(config: PreTrainedConfig, tensors: TensorSource) -> PreTrainedModel:
    """The model of `config` in float32 with the checkpoint's weights; layers beyond the configuration are not read."""
    model = empty_model(config)
    have = set(tensors.names())
    weights = {n: _whole(tensors, n) for n, _ in model.named_parameters() if n in have}
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    return model


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of `config` in float32 whose parameters take no memory (device "meta"); its rotary tables are real."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")  # type: ignore[no-untyped-call]
    for module in model.modules():  # tables that no checkpoint holds: made again, for real
        if type(module).__name__.endswith("RotaryEmbedding"):
            fresh = type(module)(config=config)
            for name, buffer in fresh.named_buffers(recurse=False):
                setattr(module, name, buffer)
    return model.eval()  # type: ignore[no-any-return]


def reference_logits(model: torch.nn.Module, ids: list[int]) -> Tensor:
    """float32 logits [len(ids), vocab]: what the model expects after each token."""
    with torch.inference_mode():
        return model(torch.tensor([ids]), use_cache=False).logits[0].float()  # type: ignore[no-any-return]


def _whole(tensors: TensorSource, name: str) -> torch.nn.Parameter:
    rows = tensors.rows(name, 0, tensors.shape(name)[0])
    return torch.nn.Parameter(rows.float(), requires_grad=False)
