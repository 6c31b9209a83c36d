"""The PyTorch model as the truth: its logits on real text, whole or cut to its first layers."""

import copy

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from starling.export.checkpoints.checkpoint import TensorSource, empty_model


def cut(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The same configuration with only its first `layers` layers."""
    shorter = copy.deepcopy(config)
    text = shorter.get_text_config(decoder=True)
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return shorter


def load_reference(config: PreTrainedConfig, tensors: TensorSource) -> PreTrainedModel:
    """The model of `config` in float32 with the checkpoint's weights; layers beyond the configuration are not read."""
    model = empty_model(config)
    have = set(tensors.names())
    weights = {n: _whole(tensors, n) for n in model.state_dict() if n in have}
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    return model


def reference_logits(model: torch.nn.Module, ids: list[int]) -> Tensor:
    """float32 logits [len(ids), vocab]: what the model expects after each token."""
    with torch.inference_mode():
        return model(torch.tensor([ids]), use_cache=False).logits[0].float()  # type: ignore[no-any-return]


def _whole(tensors: TensorSource, name: str) -> torch.nn.Parameter:
    rows = tensors.rows(name, 0, tensors.shape(name)[0])
    return torch.nn.Parameter(rows.float(), requires_grad=False)
