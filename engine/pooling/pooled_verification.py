"""Whether a bundle that scores or embeds computes on this machine what it should: texts against PyTorch's numbers.

The export keeps them. The texts are run one at a time, in pieces after a non-empty cache, and together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from starling.engine.backends.pooling_backend import PoolingBackend, Vectors
from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import BundleError
from starling.engine.pooling.runs import run_all
from starling.engine.verification import kept_reference

NUMBERS_FILE = "reference_numbers.npy"
#: Tokens of a run where texts are run one at a time: the longest takes three.
PIECE = 16
#: What a device's rounding may add to twice the export's own largest difference, and the limit where that is not known:
#: shares of PyTorch's largest number.
SLACK, UNKNOWN = 1e-2, 0.1


@dataclass(frozen=True, slots=True)
class PooledVerification:
    """A bundle on one backend against PyTorch's scores or hidden states of `texts` texts, up to `rows` in a run.

    `max_abs_diff` is None where a number is not finite, `export_max_abs_diff` what the export measured on the same
    texts on its CPU, `limit` what is taken as right, `problem` what is wrong, None where all is right.
    """

    rows: int
    texts: int
    max_abs_diff: float | None
    export_max_abs_diff: float | None
    limit: float
    problem: str | None


def compared_texts(tokens: Sequence[int]) -> list[list[int]]:
    """The texts that are made of the kept one: its first token, all of it, and parts of about a third each."""
    third, ids = len(tokens) // 3, list(tokens)
    return [ids[:1], ids, ids[:third], ids[third : 2 * third - 2], ids[2 * third :]]


def keep_numbers(folder: Path, tokens: Sequence[int], reference: Vectors, ours: Vectors | None) -> dict[str, Any]:
    """Write PyTorch's numbers [texts, width] of the `compared_texts` of `tokens` into the bundle's folder.

    `ours` are the bundle's own, None where the CPU does not run it. Returns the `verification` object of bundle.json.
    """
    np.save(folder / NUMBERS_FILE, reference.astype(np.float32), allow_pickle=False)
    apart = None if ours is None else float(np.abs(reference - ours).max())
    return {"file": NUMBERS_FILE, "tokens": [int(token) for token in tokens], "max_abs_diff": apart}


def verify_numbers(bundle: Bundle, backend: PoolingBackend, rows: int) -> PooledVerification:
    """Run the bundle's own texts, up to `rows` in a run, which the backend must take, and compare.

    Raises BundleError where the bundle keeps no reference, or a broken one.
    """
    kept = kept_reference(bundle)
    texts = compared_texts(kept.tokens)
    reference = _read(bundle, len(texts))
    ours = _run(bundle, backend, texts, rows)
    scale, known = float(np.abs(reference).max()), kept.max_abs_diff
    limit = UNKNOWN * scale if known is None else 2 * known + SLACK * scale
    apart = float(np.abs(ours - reference).max()) if np.isfinite(ours).all() else None
    problem = None
    if apart is None:
        problem = "its numbers are not all finite"
    elif apart > limit:
        problem = f"a number is {apart:.3g} from PyTorch's, more than {limit:.3g}"
    return PooledVerification(rows, len(texts), apart, known, limit, problem)


def _run(bundle: Bundle, backend: PoolingBackend, texts: Sequence[Sequence[int]], rows: int) -> Vectors:
    """Raw numbers [texts, width], not finite ones too; one text at a time and in pieces where `rows` is 1."""
    assert bundle.pooling is not None
    if rows > 1:
        return run_all(backend, texts, bundle.pooling, finite=False)
    backend.run_tokens, before = PIECE, backend.run_tokens
    try:
        return np.concatenate([run_all(backend, [text], bundle.pooling, finite=False) for text in texts])
    finally:
        backend.run_tokens = before


def _read(bundle: Bundle, texts: int) -> Vectors:
    path, shape = bundle.folder / kept_reference(bundle).file, (texts, bundle.output_width)
    try:
        found: Vectors = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} holds no numbers ({error}); export the model again") from error
    if found.dtype != np.float32 or found.shape != shape or not np.isfinite(found).all():
        raise BundleError(f"{path} has {found.dtype} {list(found.shape)}, not float32 {list(shape)}: export it again")
    return found
