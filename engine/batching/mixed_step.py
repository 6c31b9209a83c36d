"""What one run of the model takes of several rows: newest tokens, drafts after them, and a piece of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from starling.engine.backends.backend import RowPart
from starling.engine.batching.request import Request
from starling.engine.batching.rows import RowTable


@dataclass(frozen=True, slots=True)
class Piece:
    """The next `tokens` tokens of a prompt."""

    request: Request
    tokens: int

    @property
    def is_last(self) -> bool:
        """Whether the prompt ends with it."""
        return self.request.written + self.tokens == len(self.request.sequence.prompt)

    @property
    def middle(self) -> float:
        """The position of its middle."""
        return self.request.written + self.tokens / 2


@dataclass(frozen=True, slots=True)
class MixedStep:
    """Parts as `Backend.mix` takes them, and of each request the first row of the output that is its own."""

    parts: list[RowPart]
    kept: list[int]
    first_rows: dict[int, int]


def plan_mixed_step(rows: RowTable, requests: Sequence[Request], piece: Piece | None) -> MixedStep:
    """The newest token of each request with its draft, all with logits, and the piece, whose last token has them where
    the prompt ends.
    """
    parts = [
        RowPart(request.row, rows.positions[request.row], [rows.tokens[request.row], *request.draft])
        for request in requests
    ]
    if piece is not None:
        written, prompt = piece.request.written, piece.request.sequence.prompt
        parts.append(RowPart(piece.request.row, written, prompt[written : written + piece.tokens]))
        parts.sort()
    step, before = MixedStep(parts, [], {}), 0
    for row, _, tokens in parts:
        step.first_rows[row] = len(step.kept)
        end = before + len(tokens)
        if piece is None or row != piece.request.row:
            step.kept.extend(range(before, end))
        elif piece.is_last:
            step.kept.append(end - 1)
        before = end
    return step
