"""Whether a bundle computes on this machine what it should: a short text against logits that the export kept.

The text's first tokens are prefilled, then a chunk after them, then every token is a decode step of its own, in as many
rows as are asked for, so that each way to run the model is tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starling.engine.backends.backend import Backend
from starling.engine.bundle.file_records import KeptReference
from starling.engine.bundle.manifest import Bundle
from starling.engine.divergence import Divergence, Logits, QualityTotals
from starling.engine.errors import BundleError

LOGITS_FILE = "reference_logits.npy"
#: Tokens of the text that an export keeps the logits of.
REFERENCE_TOKENS = 48
#: Tokens prefilled at once, then as a chunk after a non-empty cache.
FIRST, CHUNK = 16, 16
#: What a device's rounding may add to twice the export's own mean KL, in nats; and the limit where that is not known.
KL_SLACK, KL_UNKNOWN = 1e-3, 0.05


@dataclass(frozen=True, slots=True)
class Verification:
    """A bundle on one backend against PyTorch's logits, the worst of `rows` rows. KL in nats, agreement in 0 … 1.

    `mean_kl` and the two after it are None where a logit is not a finite number. `export_mean_kl` is what the export
    measured on the same text on its CPU (None: it could not), `kl_limit` what is taken as right, `problem` what is
    wrong, None where all is right.
    """

    rows: int
    positions: int
    mean_kl: float | None
    top1_agreement: float | None
    max_abs_logit_diff: float | None
    export_mean_kl: float | None
    kl_limit: float
    problem: str | None


def compared_positions(count: int) -> list[int]:
    """The tokens of a text that `run_text` gives logits after: the ends of the two prefills, then every one."""
    return [FIRST - 1, *range(FIRST + CHUNK - 1, count)]


def run_text(backend: Backend, rows: Sequence[Sequence[int]]) -> tuple[Logits, NDArray[np.int64]]:
    """Feed texts of one length, each in a row of its own; after the tokens of `compared_positions` of each row:

    logits float32 [rows, positions, vocab] and the tokens that the backend chose, int64 [rows, positions].
    """
    tokens = np.asarray(rows, dtype=np.int64)
    logits, chosen = [], []
    for part in (slice(0, FIRST), slice(FIRST, FIRST + CHUNK)):
        outputs = []
        for row, text in enumerate(tokens):
            output = backend.prefill(row, text[part], part.start)
            outputs.append((output.logits()[0].copy(), output.tokens()[0]))
        logits.append(np.stack([found for found, _ in outputs]))
        chosen.append([token for _, token in outputs])
    for at in range(FIRST + CHUNK, tokens.shape[1]):
        output = backend.decode([int(token) for token in tokens[:, at]], [at] * len(tokens))
        logits.append(output.logits().copy())
        chosen.append(list(output.tokens()))
    return np.stack(logits, axis=1), np.array(chosen, np.int64).T


def keep_reference(folder: Path, tokens: Sequence[int], reference: Logits, ours: Logits | None) -> dict[str, Any]:
    """Write PyTorch's logits [positions, vocab] after `compared_positions` of `tokens` into the bundle's folder.

    `ours` are the bundle's own, None where the CPU does not run it. Returns the `verification` object of bundle.json.
    """
    np.save(folder / LOGITS_FILE, reference.astype(np.float16), allow_pickle=False)
    mean_kl = None if ours is None else _against(_rounded(reference), ours).mean_kl
    return {"file": LOGITS_FILE, "tokens": [int(token) for token in tokens], "mean_kl": mean_kl}


def kept_reference(bundle: Bundle) -> KeptReference:
    """The text whose logits the bundle keeps. Raises BundleError where it keeps none."""
    if bundle.verification is None:
        raise BundleError(
            f"{bundle.folder} keeps nothing of PyTorch to compare with: export it again with --check, on a machine "
            "with memory for the whole model in float32"
        )
    return bundle.verification


def verify(bundle: Bundle, backend: Backend, rows: int = 1) -> Verification:
    """Run the bundle's own text in `rows` rows of the backend, which needs as many, and compare.

    Raises BundleError where the bundle keeps no reference, or a broken one.
    """
    kept = kept_reference(bundle)
    reference = _rounded(_read(bundle, kept))
    logits, chosen = run_text(backend, [kept.tokens] * rows)
    limit = KL_UNKNOWN if kept.mean_kl is None else 2 * kept.mean_kl + KL_SLACK
    figures: dict[str, float | None] = dict.fromkeys(("mean_kl", "top1_agreement", "max_abs_logit_diff"))
    if np.isfinite(logits).all():
        worst = max((_against(reference, ours) for ours in logits), key=lambda found: found.mean_kl)
        figures = {name: getattr(worst, name) for name in figures}
    return Verification(
        rows=rows,
        positions=len(reference),
        **figures,
        export_mean_kl=kept.mean_kl,
        kl_limit=limit,
        problem=_problem(figures["mean_kl"], limit, logits, chosen),
    )


def _problem(mean_kl: float | None, limit: float, logits: Logits, chosen: NDArray[np.int64]) -> str | None:
    if mean_kl is None:
        return "its logits are not all finite numbers"
    if mean_kl > limit:
        return f"its mean KL from PyTorch is {mean_kl:.3g} nats, more than {limit:.3g}"
    if (chosen < 0).any() or (chosen >= logits.shape[-1]).any():
        return "it chose tokens outside the vocabulary"
    taken = np.take_along_axis(logits, chosen[..., None], axis=-1)[..., 0]
    if (taken < logits.max(axis=-1)).any():
        return "it chose tokens that are not the likeliest of its own logits"
    return None


def _against(reference: Logits, ours: Logits) -> Divergence:
    totals = QualityTotals()
    totals.add(ours, [0] * len(reference), reference)
    found = totals.quality().divergence
    assert found is not None  # a reference was given
    return found


def _rounded(reference: NDArray[Any]) -> Logits:
    """As the file has them: float16, read as float32."""
    return np.asarray(reference, np.float16).astype(np.float32)


def _read(bundle: Bundle, kept: KeptReference) -> NDArray[np.float16]:
    path, shape = bundle.folder / kept.file, (len(compared_positions(len(kept.tokens))), bundle.architecture.vocab_size)
    try:
        found: NDArray[np.float16] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} holds no logits ({error}); export the model again") from error
    if found.dtype != np.float16 or found.shape != shape:
        raise BundleError(f"{path} has {found.dtype} {list(found.shape)}, not float16 {list(shape)}: export it again")
    return found
