"""How many prompt tokens are prefilled between two decode steps, so that running requests keep their pace."""

from __future__ import annotations

from math import inf

#: Chunks are multiples of this: fewer tokens cost a step's whole weight traffic for little, and each length is a new
#: shape to the backend.
GRAIN = 8
#: Weight of the newest step in the running mean.
NEWEST = 0.25


class PrefillPace:
    """Learns from the steps themselves what a chunk may cost.

    While requests decode, the prefill between two steps may take `slowdown - 1` times as long as a step, so that the
    time between two tokens grows to `slowdown` times its quiet value at most. Without any, chunks are `most` tokens.
    """

    def __init__(self, most: int, slowdown: float) -> None:
        self._most, self._share = most, slowdown - 1
        self._step_s: float | None = None
        #: Seconds per token of the newest chunk, and its tokens.
        self._token_s, self._tokens = inf, 0

    def decoded(self, seconds: float) -> None:
        """A decode step took so long."""
        self._step_s = seconds if self._step_s is None else self._step_s + NEWEST * (seconds - self._step_s)

    def prefilled(self, tokens: int, seconds: float) -> None:
        """A chunk of so many tokens took so long."""
        if tokens >= GRAIN:  # a prompt's short end says nothing about chunks
            self._token_s, self._tokens = seconds / tokens, tokens

    def budget(self, decoding: bool) -> float:
        """Seconds of prefill before the next decode step; infinite where nothing decodes."""
        return self._share * self._step_s if decoding and self._step_s is not None else inf

    def chunk(self, budget: float) -> int:
        """Tokens that can be prefilled within `budget` seconds, 0 where not even the smallest chunk fits in."""
        if budget == inf:
            return self._most
        fitting = int(budget / self._token_s) // GRAIN * GRAIN
        # A short chunk costs more per token than a long one, so the estimate is raised step by step.
        return min(fitting, max(2 * self._tokens, GRAIN), self._most)
