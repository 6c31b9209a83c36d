"""The bundle of a draft model, opened beside the one whose tokens it foretells."""

from __future__ import annotations

from pathlib import Path

from starling.engine.backends.open_backend import open_backend
from starling.engine.batching.draft_model import DraftModel
from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import UserError
from starling.engine.text.tokenizer import Tokenizer


def open_draft(
    draft: str | Path | Bundle,
    bundle: Bundle,
    tokenizer: Tokenizer,
    *,
    backend: str,
    max_seq: int,
    max_batch: int,
    threads: int | None,
) -> DraftModel:
    """The draft model with a KV cache of its own, as large as the target's in rows and positions.

    Raises UserError where it has another vocabulary than `bundle`, whose `tokenizer` is given, or fewer positions; else
    what opening a bundle and a backend raises.
    """
    opened = draft if isinstance(draft, Bundle) else Bundle.open(draft)
    check_draft(opened, bundle, tokenizer)
    most = opened.architecture.max_positions
    if most < max_seq:
        raise UserError(
            f"{opened.folder}: the draft of {max_seq} positions has {most} itself: give --max-seq {most} or fewer"
        )
    return DraftModel(
        open_backend(opened, name=backend, max_seq=max_seq, max_batch=max_batch, threads=threads, takes_turns=True)
    )


def check_draft(draft: Bundle, bundle: Bundle, tokenizer: Tokenizer | None = None) -> None:
    """Raise UserError where the draft has another vocabulary than `bundle`; `tokenizer` is that one's, where loaded."""
    draft.require("generate")
    size, wanted = draft.architecture.vocab_size, bundle.architecture.vocab_size
    if size != wanted:
        raise UserError(_refused(draft, bundle, f"it has {size} tokens, the other {wanted}"))
    difference = Tokenizer.load(draft.folder, size).difference(tokenizer or Tokenizer.load(bundle.folder, wanted))
    if difference is not None:
        raise UserError(_refused(draft, bundle, difference))


def _refused(draft: Bundle, bundle: Bundle, difference: str) -> str:
    return (
        f"{draft.folder} cannot draft for {bundle.folder}: its vocabulary is another one ({difference}); "
        "give a model of the same tokenizer"
    )
