"""The rows that are decoded together, and what the next step of each is given."""

from __future__ import annotations

from dataclasses import dataclass, field

from starling.engine.logits import Logits
from starling.engine.sequence import GenerationSequence, accept


@dataclass(slots=True)
class DecodeBatch:
    """Rows 0, 1, … of the cache up to the last unfinished one, and what the next step of each is given.

    `tokens` and `positions` have an entry per row: its newest token, and where that is written.
    """

    sequences: list[GenerationSequence]
    max_seq: int
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    #: Rows that are not finished.
    live: list[int] = field(default_factory=list)
    needs_logits: bool = False

    def add(self, sequence: GenerationSequence) -> None:
        """Take the next row, prefilled and with its first token chosen."""
        self.tokens.append(sequence.prompt[-1])
        self.positions.append(len(sequence.prompt) - 1)
        self.advance(len(self.tokens) - 1, sequence.tokens[-1])

    def advance(self, row: int, token: int) -> None:
        """`token` is the row's newest. Where the cache has no room for it, what stands at the end is written again."""
        position = self.positions[row] + 1
        if position < self.max_seq:
            self.tokens[row], self.positions[row] = token, position

    def drop_finished(self) -> None:
        """Find out which rows are left; a finished one between others writes its newest token again and again."""
        self.live = [row for row, sequence in enumerate(self.sequences) if sequence.finish_reason is None]
        self.needs_logits = any(self.sequences[row].needs_logits for row in self.live)
        rows = self.live[-1] + 1 if self.live else 0
        del self.tokens[rows:], self.positions[rows:]

    def accept(self, chosen: list[int], logits: Logits | None) -> None:
        """Take a step's tokens into the unfinished rows; `logits` [rows, vocab] where one of them needs them."""
        finished, tokens, positions = False, self.tokens, self.positions
        for row in self.live:
            sequence = self.sequences[row]
            token = accept(sequence, chosen[row], None if logits is None else logits[row])
            position = positions[row] + 1
            if position < self.max_seq:  # as in `advance`: a call for each token would take 3 µs, with cold caches
                tokens[row], positions[row] = token, position
            if sequence.finish_reason is not None:
                finished = True
        if finished:
            self.drop_finished()

    def record(self, rows: list[int], seconds: float, model_s: float) -> None:
        """Note how long the step took that gave `rows` their newest tokens, and how long of it the model."""
        for row in rows:
            sequence = self.sequences[row]
            sequence.itl_s.append(seconds)
            sequence.host_s.append(seconds - model_s)
