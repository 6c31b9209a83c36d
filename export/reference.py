"""The PyTorch model as the truth: its logits on real text, whole or cut to its first layers."""

import copy

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from starling.export.checkpoint import TensorSource

# Plain prose, numbers and code, so that the check sees more than one kind of token.
PASSAGE = """\
The lighthouse keeper wrote the date, 14 March 1907, at the top of the page and waited for the ink to dry. Outside, \
the wind had turned to the north-west and the first gulls of the morning were quarrelling over something on the rocks. \
He had counted 23 ships in February and only 9 so far this month; the harbour master would want to know why.

def mean(values: list[float]) -> float:
    return sum(values) / len(values)

"Is it true," she asked, "that water boils at a lower temperature on a mountain?" It is: the pressure of the air falls \
with height, and a liquid boils when the pressure of its vapour reaches that of the air above it."""


def cut(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The same configuration with only its first `layers` layers."""
    shorter = copy.deepcopy(config)
    shorter.num_hidden_layers = layers
    if getattr(shorter, "layer_types", None):
        shorter.layer_types = shorter.layer_types[:layers]
    return shorter


def load_reference(config: PreTrainedConfig, tensors: TensorSource) -> torch.nn.Module:
    """The model of `config` in float32 with the checkpoint's weights; layers beyond the configuration are not read."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")  # type: ignore[no-untyped-call]
    have = set(tensors.names())
    weights = {n: _whole(tensors, n) for n, _ in model.named_parameters() if n in have}
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    for module in model.modules():  # tables that no checkpoint holds: made again, for real
        if type(module).__name__.endswith("RotaryEmbedding"):
            fresh = type(module)(config=config)
            for name, buffer in fresh.named_buffers(recurse=False):
                setattr(module, name, buffer)
    return model.eval()  # type: ignore[no-any-return]


def reference_logits(model: torch.nn.Module, ids: list[int]) -> Tensor:
    """float32 logits [len(ids), vocab]: what the model expects behind each token."""
    with torch.inference_mode():
        return model(torch.tensor([ids]), use_cache=False).logits[0].float()  # type: ignore[no-any-return]


def _whole(tensors: TensorSource, name: str) -> torch.nn.Parameter:
    rows = tensors.rows(name, 0, tensors.shape(name)[0])
    return torch.nn.Parameter(rows.float(), requires_grad=False)
