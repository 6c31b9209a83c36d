"""What scores and embeds: a model that is only prefilled, whose keys and values are kept for one batch of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]


class PoolingBackend(Protocol):
    """A loaded model that gives numbers for a text. Not thread-safe: one thread at a time may call it."""

    name: str
    #: Execution provider in use, for example "CPUExecutionProvider".
    provider: str
    #: The longest text, in tokens, and the most of them that one run takes together.
    max_seq: int
    max_batch: int
    #: Tokens that one run takes at most, of all its texts.
    run_tokens: int
    #: Numbers that it gives for a text: labels, or the size of an embedding.
    width: int
    #: Seconds spent inside the model's run since the backend was opened.
    model_seconds: float
    #: Why it was not another backend that "auto" took; None where there is nothing to say.
    note: str | None
    #: Instruction set of the engine's own CPU kernels where they run the bundle, and why they do not.
    kernels: str | None
    kernels_note: str | None

    def new_cache(self, rows: int, positions: int) -> Any:
        """Memory for the keys and values of `rows` texts of up to `positions` tokens; it is free when it is dropped."""
        ...

    def run(self, cache: Any, tokens: Tokens, start: int, kept: Sequence[int]) -> Vectors:
        """Write `tokens` int64 [rows, n] of all rows of `cache` at positions start..start+n.

        The scores or hidden states [rows, len(kept), width] float32 after the tokens `kept`, places among the n.
        Several rows only begin a text (`start` 0). Raises BackendError where the run fails.
        """
        ...

    def close(self) -> None:
        """Free the model."""
        ...
