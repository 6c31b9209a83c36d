"""Logits of a model on a text, kept in a file, so that a model can be a reference where it does not fit or run.

The file is NumPy's .npz: `tokens` int64 [rows, window], `context` int64 (), and `logits` float16 or float32
[rows, window - context, vocab], those after tokens context - 1 … window - 2 of each row. float16 rounds a logit of 20
by up to 0.008, which a KL of quantization (1e-3 and more) does not notice; use float32 to compare unquantized models.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starling.engine.divergence import Logits
from starling.engine.errors import UserError


@dataclass(frozen=True, slots=True)
class StoredLogits:
    """`tokens` int64 [rows, window]; `logits` [rows, window - context, vocab] in the file's dtype."""

    tokens: NDArray[np.int64]
    context: int
    logits: NDArray[Any]

    @staticmethod
    def empty(tokens: NDArray[np.int64], context: int, vocab: int, dtype: str) -> StoredLogits:
        """Room for the logits of all rows."""
        rows, window = tokens.shape
        return StoredLogits(tokens, context, np.zeros((rows, window - context, vocab), dtype))

    @staticmethod
    def read(file: Path) -> StoredLogits:
        """Raises UserError where the file is not one that `write` made."""
        try:
            with np.load(file) as stored:
                found = StoredLogits(stored["tokens"], int(stored["context"]), stored["logits"])
        except OSError as error:
            raise UserError(
                f"{file} cannot be read: {error.strerror or error}; give a file of --save-logits"
            ) from error
        except (ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{file} holds no logits ({error}); give a file of --save-logits") from error
        expected = (len(found.tokens), found.tokens.shape[-1] - found.context)
        if found.logits.ndim != 3 or found.logits.shape[:2] != expected:
            raise UserError(f"{file} has logits {list(found.logits.shape)} for other tokens: make it again")
        return found

    def write(self, file: Path) -> None:
        """Write the file, whatever its name ends with."""
        with file.open("wb") as target:
            np.savez(target, tokens=self.tokens, context=np.int64(self.context), logits=self.logits)

    def require(self, tokens: NDArray[np.int64], context: int, vocab: int) -> None:
        """Raise UserError where the logits are not those of these tokens."""
        if not np.array_equal(self.tokens, tokens) or self.context != context:
            raise UserError(
                f"the stored logits are of {list(self.tokens.shape)} tokens with context {self.context}, this text has "
                f"{list(tokens.shape)} with {context}, or other ones: use the same --text, --window, --context and "
                "--max-tokens"
            )
        if self.logits.shape[2] != vocab:
            raise UserError(
                f"the stored logits are of {self.logits.shape[2]} tokens' vocabulary, the bundle's has {vocab}"
            )

    def steps(self, batch: int) -> Iterator[tuple[slice, int, Logits]]:
        """As `starling.profiling.quality.evaluation.teacher_forced` gives them."""
        for first in range(0, len(self.tokens), batch):
            rows = slice(first, min(first + batch, len(self.tokens)))
            for step in range(self.logits.shape[1]):
                yield rows, self.context - 1 + step, self.logits[rows, step].astype(np.float32)
