"""The 7B shape with weights, for the stages that measure it, and PyTorch's logits to hold it against."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from starling.profiling.gpu.stages.kit import Kit
from starling.profiling.gpu.stages.random_bundles import fill_bundle, random_model

PROMPT, STEPS = 200, 6
_REFERENCE = "reference.pt"
_PRECISIONS = ("fp16", "int8-fp16")


def run(kit: Kit) -> None:
    """Fill both bundles from one model; no prompt here outgrows its window, which is left out."""
    names = [kit.large(precision) for precision in _PRECISIONS]
    model_name = kit.manifest(names[0])["source"]["name"]
    dtype = torch.float16 if kit.machine.is_card else torch.float32
    model = random_model(model_name, dtype, kit.machine.torch_device, window=False)
    for name in names:
        with kit.results.guarded(bundle=name):
            fill_bundle(kit, name, model)
    ids = torch.tensor(reference_ids()[None], device=kit.machine.torch_device)
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0, PROMPT - 1 :]
    torch.save(logits.float().cpu(), kit.work / _REFERENCE)


def reference_ids() -> npt.NDArray[np.int64]:
    """The prompt and the tokens after it."""
    return np.random.default_rng(3).integers(3, 31999, PROMPT + STEPS)


def reference_logits(work: Path) -> torch.Tensor:
    """PyTorch's in the bundle's own precision, [1 + STEPS, vocabulary]."""
    logits: torch.Tensor = torch.load(work / _REFERENCE)
    return logits
