"""The PyTorch module that a value head belongs to, as the card of Starling-RM-7B-alpha defines it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from starling.engine.errors import StarlingError, one_line
from starling.export.check.source_model import SourceModel, beyond_layers
from starling.export.check.torch_reference import cut
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.tokenizers.tokenizer_files import read_json


class RewardModule(nn.Module):
    """A language model's trunk and `v_head`; the score is read before the first `pad` (None: after the last token)."""

    def __init__(self, config: PreTrainedConfig, labels: int, pad: int | None) -> None:
        super().__init__()
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
            )
            self.v_head = nn.Linear(config.hidden_size, labels, bias=False)
        self.transformer = self.model.base_model
        self.pad = pad

    def forward(self, input_ids: Tensor) -> Tensor:
        """Scores [batch, labels] of `input_ids` int64 [batch, sequence], padded at the right."""
        rewards = self.v_head(self.transformer(input_ids, use_cache=False)[0])
        scores = []
        for row, ids in zip(rewards, input_ids, strict=True):
            pads = (ids == self.pad).nonzero() if self.pad is not None else []
            scores.append(row[(int(pads[0]) if len(pads) else len(ids)) - 1])
        return torch.stack(scores)


def load_reward_source(checkpoint: Checkpoint, path: Path) -> SourceModel:
    """The module with the weights of the folder at `path`, as PyTorch loads them; as many layers as the checkpoint has.

    Raises StarlingError where the files cannot be loaded.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        weights = _weights(path)
    except Exception as error:  # our reader took the files: whatever it is, it is worth a line
        raise StarlingError(f"PyTorch cannot load {path} for the check: {one_line(error)}") from error
    layers = checkpoint.config.num_hidden_layers
    labels = weights["v_head.weight"].shape[0]
    config = cut(config, layers)
    assert checkpoint.pooling is not None
    module = RewardModule(config, labels, checkpoint.pooling.pad)
    unexpected = module.load_state_dict(weights, strict=False, assign=True).unexpected_keys
    _make_buffers(module, config)
    config.num_labels = labels
    prefix = f"{module.model.base_model_prefix}."
    names = {f"{prefix}{name}": f"transformer.{name}" for name in module.transformer.state_dict()}
    names["score.weight"] = "v_head.weight"
    missing = [name for name, tensor in module.state_dict().items() if tensor.is_meta]
    unexpected = [name for name in unexpected if not beyond_layers(name, layers)]
    return SourceModel(module.eval(), names, config, frozenset(unexpected), missing)


def _weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder in float32, read by safetensors; of two the later file's."""
    index = folder / "model.safetensors.index.json"
    files = sorted(set(read_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= {name: tensor.float() for name, tensor in load_file(folder / file).items()}
    if any(name.startswith(("transformer.", "model.model.")) for name in weights):
        return weights
    # a language model's own names, with the head beside them
    return {name if name == "v_head.weight" else f"model.{name}": tensor for name, tensor in weights.items()}


def _make_buffers(module: RewardModule, config: PreTrainedConfig) -> None:
    """Tables that no file holds: those of a model that was built off the meta device."""
    from accelerate import init_empty_weights  # type: ignore[import-untyped]

    with init_empty_weights(include_buffers=False):
        real = AutoModelForCausalLM.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]
    for name, buffer in real.base_model.named_buffers():
        owner, _, last = name.rpartition(".")
        module.transformer.get_submodule(owner).register_buffer(last, buffer, persistent=False)
