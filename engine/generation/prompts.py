"""What a prompt may be, and the refusals of what it may not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from operator import index
from typing import TypeAlias

import numpy as np

from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import PromptError, one_line

#: A prompt: text, or token ids.
Prompt: TypeAlias = str | Sequence[int]


def is_single(prompt: Prompt | Sequence[Prompt]) -> bool:
    """True for one prompt (text or token ids), False for a list of prompts."""
    return isinstance(prompt, str) or len(prompt) == 0 or not isinstance(prompt[0], str | Sequence | np.ndarray)


def checked_ids(ids: Iterable[int], bundle: Bundle, max_seq: int) -> tuple[int, ...]:
    """The prompt as a tuple of ids. Raises PromptError for an empty one, ids outside the vocabulary, or too many."""
    if isinstance(ids, Sized):
        check_count(len(ids), bundle, max_seq)
    try:
        checked = tuple(index(token) for token in ids)
    except TypeError as error:
        raise PromptError("a prompt is text or a list of token ids", detail=one_line(error)) from error
    if not checked:
        raise PromptError("the prompt is empty", detail="give at least one token")
    vocabulary = bundle.architecture.vocab_size
    for position, token in enumerate(checked):
        if not 0 <= token < vocabulary:
            raise PromptError(
                f"token id {token} at position {position} is outside the model's vocabulary (0 to {vocabulary - 1})",
                detail="use this bundle's own tokenizer",
            )
    check_count(len(checked), bundle, max_seq)
    return checked


def check_count(count: int, bundle: Bundle, max_seq: int) -> None:
    """Raise PromptError for more tokens than the KV cache holds."""
    if count > max_seq:
        raise PromptError(
            f"the prompt has {count} tokens, but the KV cache holds {max_seq}",
            detail=f"shorten it, or raise --max-seq (this model: up to {bundle.architecture.max_positions})",
            client_detail="shorten it",
            code="context_length_exceeded",
        )


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids the two have in common from their beginnings."""
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)
