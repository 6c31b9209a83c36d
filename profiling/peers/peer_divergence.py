"""How far each contender's predictions are from the reference's, on the text that `starling evaluate` reads."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from starling.engine.bundle.manifest import Bundle
from starling.engine.divergence import Quality, QualityTotals
from starling.engine.errors import StarlingError
from starling.profiling.peers.contenders import OURS, Contender, opened
from starling.profiling.quality.evaluation import Options, bundle_windows
from starling.profiling.quality.evaluation_text import built_in_text
from starling.profiling.quality.stored_logits import StoredLogits

#: Rows of a window that are scored together: float64 copies of [rows, vocab] are what it takes of memory.
_ROWS = 64


def reference_of(ours: Sequence[Contender], peers: Sequence[Contender]) -> Contender | None:
    """The model at fp32 that nobody has converted, transformers' own; else our fp32 bundle; None without either."""
    candidates = [one for one in [*peers, *ours] if one.precision == "fp32" and one.peer in ("transformers", OURS)]
    return candidates[0] if candidates else None


def measure_divergence(
    bundle: Bundle,
    contenders: Sequence[Contender],
    reference: Contender,
    threads: int,
    progress: Callable[[str], None],
    most: int | None = None,
) -> tuple[dict[str, Quality], dict[str, str]]:
    """The quality of each contender by its name, and for each that could not give it one line that says why.

    `bundle` reads the text into tokens, the same for all, no more than `most`. One process runs at a time.
    Raises BackendError where the reference fails.
    """
    options = Options(text_tokens=most)
    tokens = bundle_windows(bundle, built_in_text(), options)
    context = min(options.context, tokens.shape[1] - 1)
    qualities: dict[str, Quality] = {}
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        progress(f"quality: {reference.name}, the reference")
        theirs = _logits(reference, tokens, context, threads, Path(folder) / "reference.npz")
        for contender in contenders:
            progress(f"quality: {contender.name}")
            try:
                same = contender == reference
                file = Path(folder) / "logits.npz"
                logits = theirs if same else _logits(contender, tokens, context, threads, file)
                qualities[contender.name] = score(logits, theirs)
            except StarlingError as error:
                failures[contender.name] = str(error)
    return qualities, failures


def score(logits: StoredLogits, reference: StoredLogits) -> Quality:
    """Perplexity of the logits, and their divergence from the reference's. Raises UserError where the text differs."""
    reference.require(logits.tokens, logits.context, logits.logits.shape[2])
    totals = QualityTotals()
    for row, ours, theirs in zip(logits.tokens, logits.logits, reference.logits, strict=True):
        following = row[logits.context :]
        for at in range(0, len(following), _ROWS):
            part = slice(at, at + _ROWS)
            totals.add(ours[part].astype(np.float32), following[part].tolist(), theirs[part].astype(np.float32))
    return totals.quality()


def _logits(contender: Contender, tokens: NDArray[np.int64], context: int, threads: int, file: Path) -> StoredLogits:
    with opened(contender, threads, tokens.shape[1]) as (process, _):
        process.request(op="logits", tokens=tokens.tolist(), context=context, file=str(file))
    return StoredLogits.read(file)
