"""Tiny models that score texts, saved as their owners save them, and what PyTorch makes of padded batches."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from families import Family, make_random
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from starling.export.check.reward_module import RewardModule
from starling.export.checkpoints.checkpoint import Checkpoint

LENGTHS = (1, 2, 5, 17, 40, 100, 3, 30, 77, 126, 40)
NAMES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def texts(lengths: Sequence[int] = LENGTHS, seed: int = 1) -> list[list[int]]:
    """Token ids of texts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 32000, (length,), generator=generator).tolist() for length in lengths]


def classifier_folder(family: Family, tokenizer: Checkpoint, folder: Path, **settings: Any) -> Path:
    """A *ForSequenceClassification of the family; `settings` are of its configuration."""
    torch.manual_seed(0)
    config = family.config()
    for name, value in settings.items():
        setattr(config, name, value)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    make_random(model)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer.tokenizer.tokenizer_json, encoding="utf-8")
    return folder


def reward_module(positions: int = 128) -> RewardModule:
    """A tiny random one over a Llama, pad 0, whose weights all matter."""
    torch.manual_seed(0)
    config = Family("llama", "llama", {"max_position_embeddings": positions}).config()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    make_random(model)
    module = RewardModule(config, 1, 0)
    module.model, module.transformer = model, model.base_model
    module.v_head = torch.nn.Linear(config.hidden_size, 1, bias=False)
    with torch.no_grad():
        module.v_head.weight.copy_(torch.randn(1, config.hidden_size))
    return module.eval()


def save_reward_module(module: RewardModule, tokenizer: Checkpoint, folder: Path, trunk: str = "transformer.") -> Path:
    """As its weights are published: no *ForSequenceClassification in config.json, the trunk under `trunk`."""
    folder.mkdir(parents=True)
    module.model.config.architectures = ["LlamaForCausalLM"]
    module.model.config.save_pretrained(folder)
    tensors = {f"{trunk}{name}": tensor for name, tensor in module.transformer.state_dict().items()}
    lm_head = "lm_head.weight" if trunk == "model." else "model.lm_head.weight"
    tensors |= {"v_head.weight": module.v_head.weight, lm_head: module.model.lm_head.weight}
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text(tokenizer.tokenizer.tokenizer_json, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(NAMES), encoding="utf-8")
    return folder


def padded(rows: Sequence[Sequence[int]], pad: int, side: str = "right") -> torch.Tensor:
    """int64 [rows, longest]."""
    longest = max(map(len, rows))
    fill = [[pad] * (longest - len(row)) for row in rows]
    return torch.tensor(
        [[*row, *more] if side == "right" else [*more, *row] for row, more in zip(rows, fill, strict=True)]
    )


def classifier_scores(folder: Path, rows: Sequence[Sequence[int]], pad: int, side: str) -> NDArray[np.float32]:
    """transformers' scores [rows, labels] of one padded batch, with its attention mask."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ids = padded(rows, pad, side)
    mask = padded([[1] * len(row) for row in rows], 0, side)
    with torch.inference_mode():
        scores: NDArray[np.float32] = model.eval()(ids, attention_mask=mask).logits.numpy()
    return scores
