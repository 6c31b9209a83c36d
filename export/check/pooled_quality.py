"""A bundle that scores or embeds against PyTorch in float32: the numbers of texts that no calibration has seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from starling.engine.backends.open_backend import open_pooling_backend
from starling.engine.backends.pooling_backend import Vectors
from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import StarlingError
from starling.engine.pooling.pooled_verification import compared_texts, keep_numbers
from starling.engine.pooling.runs import run_all
from starling.engine.verification import REFERENCE_TOKENS
from starling.export.check.bundle_quality import HELD_OUT_TOKENS, held_out_texts, load_compared
from starling.export.checkpoints.checkpoint import Checkpoint

FP32_TOLERANCE = 1e-3  # largest difference that a full-precision bundle may show, of a score or a hidden state
#: Texts are compared after so many of their tokens: one token, some that run together, and more than one run takes.
LENGTHS, RUN_TOKENS = (1, 16, 50, HELD_OUT_TOKENS), 64


@dataclass(frozen=True, slots=True)
class PooledParity:
    """How far a bundle is from PyTorch in float32, over `texts`: of a score, or of a number of an embedding.

    `reference_std` is how much PyTorch's own differ between the texts, the mean over the numbers; `min_cosine` is None
    for scores; `kernels` the instruction set of the engine's own CPU kernels, None where ONNX Runtime's ran the bundle.
    """

    texts: int
    layers: int
    max_abs_diff: float
    mean_abs_diff: float
    reference_std: float
    min_cosine: float | None
    kernels: str | None

    def to_json(self) -> dict[str, Any]:
        """The `parity` object of bundle.json."""
        return asdict(self)


def measure_pooled(checkpoint: Checkpoint, folder: Path) -> tuple[PooledParity, dict[str, Any]]:
    """Compare the bundle in `folder` with the PyTorch model of `checkpoint`, which has as many layers.

    A few of PyTorch's numbers stay in the folder; the second result is what bundle.json says of them.
    """
    bundle = Bundle.open(folder)
    held_out = held_out_texts(bundle)
    texts = [text[:length] for text in held_out for length in LENGTHS]
    kept = held_out[0][:REFERENCE_TOKENS]
    model = load_compared(checkpoint)
    reference = reference_vectors(model, texts, bundle)
    kept_reference = reference_vectors(model, compared_texts(kept), bundle)
    del model  # the bundle is loaded next: the two need not fit at once
    backend = open_pooling_backend(bundle, name="onnxruntime-cpu", max_seq=max(LENGTHS), max_batch=4)
    backend.run_tokens = RUN_TOKENS
    try:
        assert bundle.pooling is not None
        ours = run_all(backend, texts, bundle.pooling)
        kept_ours = run_all(backend, compared_texts(kept), bundle.pooling)
    finally:
        backend.close()
    return compare_pooled(reference, ours, bundle, backend.kernels), keep_numbers(
        folder, kept, kept_reference, kept_ours
    )


def keep_pooled(model: torch.nn.Module, folder: Path) -> dict[str, Any]:
    """Keep PyTorch's numbers as `measure_pooled` does, for a bundle that the CPU does not run."""
    bundle = Bundle.open(folder)
    kept = held_out_texts(bundle)[0][:REFERENCE_TOKENS]
    return keep_numbers(folder, kept, reference_vectors(model, compared_texts(kept), bundle), None)


def reference_vectors(model: torch.nn.Module, texts: Sequence[Sequence[int]], bundle: Bundle) -> Vectors:
    """What PyTorch gives for each text alone: float32 [texts, labels], or [texts, hidden] as the bundle pools."""
    with torch.inference_mode():
        found = [_reference(model, torch.tensor([list(text)]), bundle) for text in texts]
    return torch.cat(found).float().numpy()


def _reference(model: torch.nn.Module, ids: torch.Tensor, bundle: Bundle) -> torch.Tensor:
    if bundle.task == "embed":
        hidden: torch.Tensor = model.base_model(ids, use_cache=False)[0]  # type: ignore[operator]
        mean = bundle.pooling is not None and bundle.pooling.read_at == "mean"
        return hidden.mean(dim=1) if mean else hidden[:, -1]
    output = model(ids)
    return output if isinstance(output, torch.Tensor) else output.logits


def compare_pooled(reference: Vectors, ours: Vectors, bundle: Bundle, kernels: str | None) -> PooledParity:
    """Measure `ours` [texts, width] against `reference`."""
    apart = np.abs(reference - ours)
    lengths = np.linalg.norm(reference, axis=1) * np.linalg.norm(ours, axis=1)
    cosines = (reference * ours).sum(axis=1) / np.maximum(lengths, np.finfo(np.float32).tiny)
    return PooledParity(
        texts=len(reference),
        layers=bundle.architecture.layers,
        max_abs_diff=float(apart.max()),
        mean_abs_diff=float(apart.mean()),
        reference_std=float(reference.std(axis=0).mean()),
        min_cosine=float(cosines.min()) if bundle.task == "embed" else None,
        kernels=kernels,
    )


def require_fp32_pooled(parity: PooledParity) -> None:
    """Raise StarlingError where a full-precision float32 bundle is not the PyTorch model's equal."""
    if parity.max_abs_diff > FP32_TOLERANCE:
        raise StarlingError(
            f"the exported graph disagrees with PyTorch: its numbers differ by up to {parity.max_abs_diff:.3g} (limit "
            f"{FP32_TOLERANCE:g}); nothing was written, please report it"
        )
