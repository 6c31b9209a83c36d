"""Compare a bundle with the PyTorch model on held-out text: prefill, a chunk after it, then token by token."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starling.engine.backends.open_backend import open_backend
from starling.engine.bundle.manifest import Bundle
from starling.engine.divergence import QualityTotals
from starling.engine.errors import StarlingError
from starling.engine.verification import run_text

FP32_TOLERANCE = 1e-3  # largest difference of a logit that a full-precision bundle may show


@dataclass(frozen=True, slots=True)
class Parity:
    """How far a bundle is from PyTorch in float32, over `positions` next-token distributions.

    `max_abs_logit_diff` in logits; `mean_kl`, `max_kl` KL(PyTorch || bundle) in nats; `top1_agreement` in 0 … 1;
    `layers` how many of the model's layers were compared; `perplexity`, `reference_perplexity` on the passage;
    `kernels` the instruction set of the engine's own CPU kernels, None where ONNX Runtime's operators ran the bundle.
    """

    positions: int
    layers: int
    max_abs_logit_diff: float
    mean_kl: float
    max_kl: float
    top1_agreement: float
    perplexity: float
    reference_perplexity: float
    kernels: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The `parity` object of bundle.json."""
        return asdict(self)


def bundle_logits(bundle: Bundle, rows: list[list[int]]) -> tuple[NDArray[np.float32], str | None]:
    """Logits [rows * positions, vocab] of the bundle on the CPU after the tokens of `compared_positions`; kernels."""
    backend = open_backend(bundle, name="onnxruntime-cpu", max_seq=len(rows[0]), max_batch=len(rows))
    try:
        logits, _ = run_text(backend, rows)
    finally:
        backend.close()
    return logits.reshape(-1, logits.shape[-1]), backend.kernels


def compare(
    reference: NDArray[np.float32], ours: NDArray[np.float32], next_ids: list[int], layers: int, kernels: str | None
) -> Parity:
    """Measure `ours` [positions, vocab] against `reference`; `next_ids` is the text's own next token per position."""
    totals = QualityTotals()
    totals.add(ours, next_ids, reference)
    quality = totals.quality()
    assert quality.divergence is not None  # a reference was given
    return Parity(
        positions=quality.positions,
        layers=layers,
        perplexity=quality.perplexity,
        kernels=kernels,
        **asdict(quality.divergence),
    )


def require_fp32(parity: Parity) -> None:
    """Raise StarlingError where a full-precision float32 bundle is not the PyTorch model's equal."""
    if parity.max_abs_logit_diff > FP32_TOLERANCE or parity.top1_agreement < 1:
        raise StarlingError(
            f"the exported graph disagrees with PyTorch: max |Δlogit| {parity.max_abs_logit_diff:.3g} (limit "
            f"{FP32_TOLERANCE:g}), top-1 agreement {parity.top1_agreement:.3f}; nothing was written, please report it"
        )
