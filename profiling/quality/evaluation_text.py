"""The text that a bundle is evaluated on, as windows of token ids."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from starling.engine.errors import UserError
from starling.engine.text.tokenizer import Tokenizer

BUILT_IN = "texts/evaluation.txt"


def built_in_text() -> str:
    """Some two pages written for this: prose, dialogue, explanation, code, a recipe, a query; no calibration saw it."""
    return resources.files("starling.profiling.quality").joinpath(BUILT_IN).read_text(encoding="utf-8")


def read_text(file: Path) -> str:
    """A file's text. Raises UserError where it cannot be read or is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}; give a text file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 (byte {error.start}): convert it to UTF-8") from error


def windows(
    tokenizer: Tokenizer, text: str, *, bos: int | None, window: int, most: int | None = None
) -> NDArray[np.int64]:
    """int64 [rows, window]: the text cut into windows that do not overlap; what does not fill one is left out.

    A text shorter than a window is one row of its own length. Where the tokenizer puts `bos` before a text, every
    window begins with it. `most` limits the tokens of all rows. Raises UserError for a text of fewer than two tokens.
    """
    ids = tokenizer.encode(text)[:most]
    head = [bos] if bos is not None and ids[:1] == [bos] else []
    body = ids[len(head) :]
    if len(ids) < 2:
        raise UserError(f"the text has {len(ids)} token(s), and a prediction needs 2: give a longer --text")
    width = min(window, len(ids)) - len(head)
    rows = [head + body[at : at + width] for at in range(0, len(body) - width + 1, width)]
    return np.array(rows, np.int64)
