"""Measure what a bundle predicts on a text, alone or against a reference.

Every window's first tokens are prefilled, the others are decoded one by one with the text's own tokens, several windows
together: the figures are of the steps that generation takes, KV cache and decode kernels included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from starling.engine.backends.backend import Backend
from starling.engine.backends.open_backend import open_backend
from starling.engine.bundle.manifest import Bundle
from starling.engine.divergence import Logits, Quality, QualityTotals
from starling.engine.errors import UserError
from starling.engine.progress import Advance
from starling.engine.text.tokenizer import Tokenizer
from starling.profiling.quality.evaluation_text import windows
from starling.profiling.quality.stored_logits import StoredLogits

Tokens = NDArray[np.int64]
#: Rows whose logits are computed together, the step among their windows' tokens, and the logits [rows, vocab].
Step = tuple[slice, int, Logits]


@dataclass(frozen=True, slots=True)
class Options:
    """How a text is run: windows of `window` tokens, of which `context` are prefilled and not scored but the last.

    `max_batch` windows run together; `text_tokens` limits the text. Raises UserError for a size that cannot be.
    """

    window: int = 256
    context: int = 16
    max_batch: int = 8
    text_tokens: int | None = None
    backend: str = "auto"
    engine: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, size in (("--context", self.context), ("--max-batch", self.max_batch)):
            if size < 1:
                raise UserError(f"{name} is {size}: give 1 or more")
        if self.window <= self.context:
            raise UserError(f"--window is {self.window}: give more than the {self.context} tokens of --context")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """`tokens` int64 [rows, window] is what was run; `logits` what the bundle gave, where they were to be kept."""

    quality: Quality
    tokens: Tokens
    provider: str
    logits: StoredLogits | None


def evaluate(
    bundle: Bundle,
    text: str,
    options: Options,
    *,
    reference: Bundle | StoredLogits | None = None,
    keep: str | None = None,
    progress: Advance = lambda done, total: None,
) -> Evaluation:
    """Run `bundle` over the text; `keep` is the dtype in which its logits are kept ("float16", "float32").

    `progress` gets the steps done and their total. Raises UserError where the reference is of another text or
    vocabulary.
    """
    tokens = bundle_windows(bundle, text, options)
    context = min(options.context, tokens.shape[1] - 1)
    totals = QualityTotals()
    kept = StoredLogits.empty(tokens, context, bundle.architecture.vocab_size, keep) if keep else None
    other = _reference_steps(reference, bundle, text, tokens, options, context)
    backend = _open(bundle, tokens, options)
    total = -(-len(tokens) // options.max_batch) * (tokens.shape[1] - context)
    try:
        for done, (rows, at, logits) in enumerate(teacher_forced(backend, tokens, context, options.max_batch), 1):
            theirs = None if other is None else next(other)[2]
            totals.add(logits, tokens[rows, at + 1].tolist(), theirs)
            if kept is not None:
                kept.logits[rows, at + 1 - context] = logits
            progress(done, total)
    finally:
        backend.close()
        if other is not None:
            other.close()
    return Evaluation(totals.quality(), tokens, backend.provider, kept)


def bundle_windows(bundle: Bundle, text: str, options: Options) -> Tokens:
    """The text's windows by the bundle's own tokenizer."""
    window = min(options.window, bundle.architecture.max_positions)
    tokenizer = Tokenizer.load(bundle.folder, bundle.architecture.vocab_size)
    return windows(tokenizer, text, bos=bundle.tokens.bos, window=window, most=options.text_tokens)


def teacher_forced(backend: Backend, tokens: Tokens, context: int, batch: int) -> Iterator[Step]:
    """The logits after tokens context - 1 … window - 2 of each row, whatever the model would have said.

    They are the backend's memory: valid until the next step is asked for.
    """
    for first in range(0, len(tokens), batch):
        rows = slice(first, min(first + batch, len(tokens)))
        group = tokens[rows]
        prefilled = [backend.prefill(number, row[:context], 0).logits()[0].copy() for number, row in enumerate(group)]
        yield rows, context - 1, np.stack(prefilled)
        for at in range(context, group.shape[1] - 1):
            yield rows, at, backend.decode(group[:, at].tolist(), [at] * len(group)).logits()


def _reference_steps(
    reference: Bundle | StoredLogits | None, bundle: Bundle, text: str, tokens: Tokens, options: Options, context: int
) -> _Closable | None:
    if reference is None:
        return None
    if isinstance(reference, StoredLogits):
        reference.require(tokens, context, bundle.architecture.vocab_size)
        return _Closable(reference.steps(options.max_batch), lambda: None)
    if not np.array_equal(bundle_windows(reference, text, options), tokens):
        raise UserError(
            f"{reference.folder} reads the text as other tokens than {bundle.folder}: give the same model's"
        )
    if reference.architecture.vocab_size != bundle.architecture.vocab_size:
        sizes = f"{reference.architecture.vocab_size} and {bundle.architecture.vocab_size}"
        raise UserError(f"{reference.folder} and {bundle.folder} have {sizes} logits: give the same model's")
    backend = _open(reference, tokens, options)
    return _Closable(teacher_forced(backend, tokens, context, options.max_batch), backend.close)


def _open(bundle: Bundle, tokens: Tokens, options: Options) -> Backend:
    return open_backend(
        bundle,
        name=options.backend,
        engine=options.engine,
        max_seq=tokens.shape[1],
        max_batch=min(options.max_batch, len(tokens)),
        threads=options.threads,
    )


class _Closable(Iterator[Step]):
    """Steps, and what has to be closed after them."""

    def __init__(self, steps: Iterator[Step], close: Callable[[], None]) -> None:
        self._steps, self.close = steps, close

    def __next__(self) -> Step:
        return next(self._steps)
