"""What a profile runs: the points of a sweep, and how often each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import UserError


@dataclass(frozen=True, slots=True)
class Point:
    """One combination of lengths and batch: `batch` rows that each generate `new_tokens` after `prompt_tokens`."""

    prompt_tokens: int
    new_tokens: int
    batch: int

    @property
    def positions(self) -> int:
        """Positions of the KV cache that a row needs."""
        return self.prompt_tokens + self.new_tokens


@dataclass(frozen=True, slots=True)
class Sweep:
    """Every combination of the lengths and batches; each is measured `repeats` times after `warmup` unmeasured runs.

    Raises UserError for a count below 1, fewer than two new tokens (decoding begins with the second), or a value that a
    list has twice: its points could not be told apart.
    """

    prompt_tokens: tuple[int, ...] = (128,)
    new_tokens: tuple[int, ...] = (48,)
    batch: tuple[int, ...] = (1,)
    repeats: int = 5
    warmup: int = 1

    def __post_init__(self) -> None:
        _check("prompt_tokens", self.prompt_tokens, 1)
        _check("new_tokens", self.new_tokens, 2)
        _check("batch", self.batch, 1)
        _check("repeats", (self.repeats,), 1)
        _check("warmup", (self.warmup,), 0)

    @property
    def points(self) -> list[Point]:
        """The combinations: batch varies fastest, the prompt's length slowest."""
        return [Point(*lengths) for lengths in product(self.prompt_tokens, self.new_tokens, self.batch)]

    @property
    def max_batch(self) -> int:
        """Rows that the KV cache needs."""
        return max(self.batch)

    def positions(self, bundle: Bundle, max_seq: int | None = None) -> int:
        """Positions for the KV cache: `max_seq`, else as many as the longest run needs. Raises UserError if too few."""
        if max_seq is not None:
            _check("max_seq", (max_seq,), 1)
        longest = max(self.points, key=lambda point: point.positions)
        room, what, more = bundle.architecture.max_positions, "this model has", ""
        if max_seq is not None and max_seq <= room:
            room, what, more = max_seq, "--max-seq is", ", or raise --max-seq"
        if longest.positions > room:
            raise UserError(
                f"{longest.prompt_tokens} prompt tokens and {longest.new_tokens} new ones need {longest.positions} "
                f"positions, but {what} {room}: lower --prompt-tokens or --new-tokens{more}"
            )
        return max_seq or longest.positions


def _check(name: str, values: Sequence[int], bound: int) -> None:
    option = f"--{name.replace('_', '-')}"
    for value in values:
        if value < bound:
            raise UserError(f"{option} is {value}: give {bound} or more")
        if values.count(value) > 1:
            raise UserError(f"{option} has {value} twice: give every value once")
