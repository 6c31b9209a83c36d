"""How many prompt tokens are prefilled between two decode steps, so that running requests keep their pace."""

from __future__ import annotations

from math import inf
from sys import maxsize
from typing import Protocol

#: Chunks are multiples of this, or a few shorter lengths: each length is a new shape to the backend.
GRAIN = 8
#: Tokens of the chunk that is prefilled even where none fits in: a prompt must go on.
LEAST = 4
#: Weight of the newest step or chunk in the running means.
NEWEST = 0.25
#: How much of the longest chunk's length is forgotten with each that is shorter.
FORGOTTEN = 0.05
#: Of the very first chunk's time, what is taken for its tokens' until lengths have varied. Little, so that longer ones
#: are tried: each is at most twice as long as the ones before, so it cannot miss by much.
FIRST_SHARE = 0.25
#: What took more than so many times its prediction was held up by something else; it counts as so much.
OUTLIER = 3


class Pace(Protocol):
    """Divides a scheduler's time between prompts and running requests."""

    #: Whether all prompts are prefilled before anything decodes.
    prompts_first: bool

    def decoded(self, rows: int, seconds: float, *, after_chunk: bool) -> None:
        """A decode step of so many live rows took so long."""

    def prefilled(self, tokens: int, seconds: float) -> None:
        """A chunk of so many tokens took so long."""

    def budget(self, rows: int) -> float:
        """Seconds of prefill before the next decode step of so many rows; infinite for one chunk, however long."""

    def chunk(self, budget: float) -> int:
        """Tokens that can be prefilled within `budget` seconds, 0 where not even the smallest chunk fits in."""


class PromptsFirst:
    """A static batch: its prompts are prefilled whole, one after the other, and then decode together."""

    prompts_first = True

    def decoded(self, rows: int, seconds: float, *, after_chunk: bool) -> None:
        """Nothing to learn."""

    def prefilled(self, tokens: int, seconds: float) -> None:
        """Nothing to learn."""

    def budget(self, rows: int) -> float:
        """No bound."""
        return inf

    def chunk(self, budget: float) -> int:
        """The whole prompt."""
        return maxsize


class PrefillPace:
    """Learns from the steps themselves what a chunk may cost.

    While requests decode, the time from one token to the next, which is a chunk and a decode step, may grow to
    `slowdown` times a quiet decode step of as many rows. Without any, chunks are `most` tokens.
    """

    prompts_first = False

    def __init__(self, most: int, slowdown: float) -> None:
        self._most, self._slowdown = most, slowdown
        #: Seconds of a decode step that no chunk went before, by its rows.
        self._quiet_s: dict[int, float] = {}
        #: A decode step right after a chunk takes so many times a quiet one (cold caches).
        self._after_chunk = 1.0
        self._cost = ChunkCost()

    def decoded(self, rows: int, seconds: float, *, after_chunk: bool) -> None:
        """A decode step of so many live rows took so long."""
        quiet = self._quiet_s.setdefault(rows, seconds / self._after_chunk if after_chunk else seconds)
        if after_chunk:
            self._after_chunk = max(1.0, self._after_chunk + NEWEST * (seconds / quiet - self._after_chunk))
        else:
            self._quiet_s[rows] = quiet + NEWEST * (seconds - quiet)

    def prefilled(self, tokens: int, seconds: float) -> None:
        """A chunk of so many tokens took so long."""
        self._cost.observe(tokens, seconds)

    def budget(self, rows: int) -> float:
        """Seconds of prefill before the next decode step of so many rows; infinite where nothing decodes.

        0 where not even the steps after chunks keep within the bound.
        """
        if not rows or not self._quiet_s:
            return inf
        nearest = min(self._quiet_s, key=lambda known: abs(known - rows))
        return max(0.0, self._quiet_s[nearest] * (self._slowdown - self._after_chunk))

    def chunk(self, budget: float) -> int:
        """Tokens that can be prefilled within `budget` seconds, 0 where not even the smallest chunk fits in."""
        if budget == inf:
            return self._most
        fitting = self._cost.fitting(budget)
        return 0 if fitting < LEAST else min(fitting // GRAIN * GRAIN or fitting // 2 * 2, self._most)


class ChunkCost:
    """What a chunk of n tokens costs: base + slope * n seconds, fitted to the newest chunks.

    The base is a pass over the weights, which a short chunk pays as a long one does. How much a token costs grows with
    the positions before it, and both depend on the kernels: so they are learned, by exponentially weighted means and
    covariance.
    """

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0
        self._variance = self._covariance = 0.0
        self._slope = 0.0
        #: Mean error of the predictions, in seconds.
        self._error = 0.0
        #: Tokens of the longest chunk, forgotten slowly.
        self._longest = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        """A chunk of so many tokens took so long."""
        if not self._longest:
            self._tokens, self._seconds, self._slope = tokens, seconds, FIRST_SHARE * seconds / tokens
        else:
            expected = self._predict(tokens)
            seconds = min(seconds, OUTLIER * expected)
            self._error += NEWEST * (abs(seconds - expected) - self._error)
        self._longest = max(tokens, (1 - FORGOTTEN) * self._longest)
        more, longer = tokens - self._tokens, seconds - self._seconds
        self._tokens += NEWEST * more
        self._seconds += NEWEST * longer
        self._variance = (1 - NEWEST) * (self._variance + NEWEST * more * more)
        self._covariance = (1 - NEWEST) * (self._covariance + NEWEST * more * longer)
        # Where lengths hardly vary, noise would make the slope: it then stays nearly what it was.
        slope = (self._covariance + GRAIN * self._slope) / (self._variance + GRAIN)
        self._slope = min(max(slope, 0.0), self._seconds / self._tokens)

    def fitting(self, seconds: float) -> int:
        """The most tokens of a chunk that is likely to take at most so long; at most twice as many as the longest of
        late, since what lies far from all that was observed is only guessed.
        """
        if not self._longest:
            return 0
        left = seconds - self._error - self._predict(0)
        if left <= 0:
            return 0
        most = max(int(2 * self._longest), GRAIN)
        return most if left >= most * self._slope else int(left / self._slope)

    def _predict(self, tokens: int) -> float:
        return self._seconds + self._slope * (tokens - self._tokens)
