"""The text that a model is calibrated on and judged by: built in, or the user's own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starling.engine.errors import PromptError, UserError
from starling.engine.text.chat_template import ChatTemplates
from starling.engine.text.tokenizer import Tokenizer

if TYPE_CHECKING:  # a text is looked at before PyTorch is loaded
    from torch import Tensor

_TEXTS = Path(__file__).parent / "texts"
CALIBRATION, HELD_OUT = _TEXTS / "calibration.jsonl", _TEXTS / "held_out.jsonl"
ROW_TOKENS = 256
LEAST_TOKENS = 256
_LEAST_ROW = 16  # a shorter piece tells more of a text's first tokens than of text


@dataclass(frozen=True, slots=True)
class TokenRows:
    """`ids` int64 [rows, longest], of which the first `lengths[i]` of row i are text; the rest is padding after it."""

    ids: Tensor
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """How many tokens of text there are."""
        return sum(self.lengths)


def text_mask(rows: TokenRows) -> Tensor:
    """bool [rows, longest]: what is text."""
    import torch

    return torch.arange(rows.ids.shape[1])[None, :] < torch.tensor(rows.lengths)[:, None]


def text_pieces(x: Tensor, rows: TokenRows) -> Iterator[Tensor]:
    """The text of each row of x [rows, longest, columns]; axes of one, or rows in one, are as good.

    What comes in an order of its own counts whole, padding too.
    """
    columns = x.shape[-1]
    if x.numel() != rows.ids.numel() * columns:
        yield x.reshape(-1, columns)
        return
    for row, length in zip(x.reshape(*rows.ids.shape, columns), rows.lengths, strict=True):
        yield row[:length]


def read_texts(path: Path) -> list[dict[str, Any]]:
    """The documents of a file: each has "text", or "messages" (role and content) for the chat template.

    A .jsonl file holds one such object a line, any other file is one text. Raises UserError naming what is wrong.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a text file, or a .jsonl file of lines with a text") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): convert it, or give another file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a text file or a .jsonl file") from None
    if not content.strip():
        raise UserError(f"{path} is empty: give a file with some pages of text")
    if path.suffix != ".jsonl":
        return [{"text": content}]
    return [_document(path, number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]


def _document(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{path}, line {number} is not JSON: each line wants an object with a text") from None
    if not isinstance(document, dict) or not (_is_text(document) or _is_chat(document)):
        raise UserError(f'{path}, line {number} has neither "text" nor "messages" with role and content as strings')
    return document


def _is_text(document: Mapping[str, Any]) -> bool:
    return isinstance(document.get("text"), str)


def _is_chat(document: Mapping[str, Any]) -> bool:
    messages = document.get("messages")
    return isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )


class TextEncoder:
    """Documents to token ids with the tokenizer and the chat template of a bundle folder."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self._tokenizer = Tokenizer.load(folder, vocab_size)
        self._templates = ChatTemplates.load(folder)
        self._begins = self._tokenizer.encode("")

    def ids(self, document: Mapping[str, Any]) -> list[int]:
        """The token ids of one document; a chat without a template for it is read as plain paragraphs."""
        if _is_text(document):
            return self._tokenizer.encode(document["text"])
        messages: Sequence[Mapping[str, Any]] = document["messages"]
        plain = self._tokenizer.encode("\n\n".join(message["content"] for message in messages))
        try:
            ids = self._templates.encode(messages, self._tokenizer, add_generation_prompt=False)
        except PromptError:
            return plain
        return ids if 2 * len(ids) >= len(plain) else plain  # a template may leave out what the messages say

    def pieces(self, document: Mapping[str, Any], longest: int) -> list[list[int]]:
        """The token ids in pieces of at most `longest`, each after the token that the model wants at the beginning."""
        ids = self.ids(document)
        first = ids[:1] if self._begins and ids[:1] == self._begins[:1] else []
        step = longest - len(first)
        return [first + ids[start : start + step] for start in range(len(first), len(ids), step)]


def calibration_rows(path: Path, encoder: TextEncoder, most_tokens: int, longest: int) -> TokenRows:
    """The documents of `path` in rows of at most `longest` tokens, until there are `most_tokens`.

    Raises UserError where the file cannot be used or is too short to calibrate with.
    """
    rows: list[list[int]] = []
    for document in read_texts(path):
        rows += encoder.pieces(document, min(ROW_TOKENS, longest))
    chosen, total = [], 0
    for row in rows:
        row = row[: most_tokens - total]
        if len(row) >= _LEAST_ROW:
            chosen.append(row)
            total += len(row)
    if total < min(LEAST_TOKENS, most_tokens):
        raise UserError(f"{path} gives only {total} tokens, calibration wants at least {LEAST_TOKENS}: give more text")
    return _padded(chosen)


def held_out_rows(encoder: TextEncoder, longest: int) -> list[list[int]]:
    """The built-in text that no calibration sees, as rows of one length (at most `longest`), longest possible."""
    rows = [encoder.ids(document) for document in read_texts(HELD_OUT)]
    length = min(longest, *map(len, rows))
    return [row[:length] for row in rows]


def _padded(rows: list[list[int]]) -> TokenRows:
    import torch

    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    return TokenRows(ids, tuple(map(len, rows)))
