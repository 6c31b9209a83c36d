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
    opened.require("generate")
    sizes = opened.architecture.vocab_size, bundle.architecture.vocab_size
    if sizes[0] != sizes[1]:
        raise UserError(_refused(opened, bundle, f"it has {sizes[0]} tokens, the other {sizes[1]}"))
    difference = Tokenizer.load(opened.folder, sizes[0]).difference(tokenizer)
    if difference is not None:
        raise UserError(_refused(opened, bundle, difference))
    most = opened.architecture.max_positions
    if most < max_seq:
        raise UserError(
            f"{opened.folder}: the draft of {max_seq} positions has {most} itself: give --max-seq {most} or fewer"
        )
    return DraftModel(open_backend(opened, name=backend, max_seq=max_seq, max_batch=max_batch, threads=threads))


def _refused(draft: Bundle, bundle: Bundle, difference: str) -> str:
    return (
        f"{draft.folder} cannot draft for {bundle.folder}: its vocabulary is another one ({difference}); "
        "give a model of the same tokenizer"
    )
