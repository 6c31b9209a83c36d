"""How many prompt tokens are prefilled between two decode steps, so that running requests keep their pace."""

from __future__ import annotations

from math import inf
from sys import maxsize
from typing import Protocol

from starling.engine.batching.step_costs import FORGOTTEN, ExtraCost, StepCosts

#: Chunks are multiples of this, or a few shorter lengths: each length is a new shape to the backend.
GRAIN = 8
#: Tokens of the chunk that is prefilled even where none fits in: a prompt must go on.
LEAST = 4
#: The same in a step of others, where they cost less.
LEAST_BESIDE = 2
#: Up to so many tokens beside a step, a few more or less show.
FEW = 32


class Pace(Protocol):
    """Divides a scheduler's time between prompts and running requests."""

    #: Whether all prompts are prefilled before anything decodes.
    prompts_first: bool

    @property
    def costs(self) -> StepCosts | None:
        """What steps take; None where nobody asks."""

    def prefilled(self, tokens: int, position: float, seconds: float) -> None:
        """A chunk of so many tokens, in the middle at this position, took so long apart from all steps."""

    def budget(self, rows: int, favour: float) -> float:
        """Seconds of prefill before the next decode step of so many rows; infinite for one chunk, however long.

        The bound on that step is `favour` times what it is for a prompt that came to running requests.
        """

    def chunk(self, budget: float, position: float = 0.0) -> int:
        """Tokens that can be prefilled within `budget` seconds, 0 where not even the smallest chunk fits in."""

    def beside(self, rows: int, favour: float, drafted: int, position: float) -> int:
        """Tokens of prompts that can run in one step with so many live rows and the tokens drafted for them."""

    def least_s(self, tokens: int) -> float:
        """Seconds that a prompt of so many tokens takes at least, 0 where nothing is known."""


class PromptsFirst:
    """A static batch: its prompts are prefilled whole, one after the other, and then decode together."""

    prompts_first = True

    def __init__(self, *, measures: bool = False) -> None:
        """With `measures` steps are timed, for drafts."""
        self.costs: StepCosts | None = StepCosts() if measures else None

    def prefilled(self, tokens: int, position: float, seconds: float) -> None:
        """Nothing to learn."""

    def budget(self, rows: int, favour: float) -> float:
        """No bound."""
        return inf

    def chunk(self, budget: float, position: float = 0.0) -> int:
        """The whole prompt."""
        return maxsize

    def beside(self, rows: int, favour: float, drafted: int, position: float) -> int:
        """Prompts do not run beside anything."""
        return 0

    def least_s(self, tokens: int) -> float:
        """Nothing is known."""
        return 0.0


class PrefillPace:
    """Learns from the steps themselves what tokens of prompts may cost.

    While requests decode, the time from one token to the next may grow to `slowdown` times a quiet decode step of as
    many rows: a step with tokens of prompts beside it or, where the backend cannot mix them, a chunk and a step.
    Without any, and where `favour` is infinite, chunks are `most` tokens.
    """

    prompts_first = False

    def __init__(self, most: int, slowdown: float) -> None:
        self._most, self._slowdown = most, slowdown
        self.costs: StepCosts = StepCosts()
        #: Of chunks that run apart.
        self._chunks = ExtraCost()
        #: Seconds that a token of a prompt took in the quickest chunks of late.
        self._quickest_s = 0.0

    def prefilled(self, tokens: int, position: float, seconds: float) -> None:
        """A chunk of so many tokens, in the middle at this position, took so long apart from all steps."""
        self._chunks.observe(tokens, position, seconds)
        each = seconds / tokens
        if not self._quickest_s or each < self._quickest_s:
            self._quickest_s = each
        else:
            self._quickest_s = min(each, self._quickest_s * (1 + FORGOTTEN))

    def budget(self, rows: int, favour: float) -> float:
        """Seconds of prefill before the next decode step of so many rows; infinite where nothing decodes.

        0 where not even the steps after chunks keep within the bound.
        """
        quiet = self.costs.quiet_s(rows) if rows and favour < inf else None
        return inf if quiet is None else max(0.0, quiet * (self._slowdown * favour - self.costs.after_chunk))

    def chunk(self, budget: float, position: float = 0.0) -> int:
        """Tokens that can be prefilled within `budget` seconds, 0 where not even the smallest chunk fits in."""
        if budget == inf:
            return self._most
        return self._rounded(self._chunks.fitting(budget, position))

    def beside(self, rows: int, favour: float, drafted: int, position: float) -> int:
        """Tokens of prompts that can run in one step with so many live rows and the tokens drafted for them."""
        if favour == inf:
            return self._most
        quiet = self.costs.quiet_s(rows)
        if quiet is None:
            return LEAST_BESIDE
        left = quiet * (self._slowdown * favour - 1) - self.costs.drafts.predict(drafted, 0.0)
        fitting = self.costs.prompts.fitting(left, position)
        return min(max(fitting // 2 * 2 if fitting < FEW else fitting // GRAIN * GRAIN, LEAST_BESIDE), self._most)

    def least_s(self, tokens: int) -> float:
        """Seconds that a prompt of so many tokens takes at least."""
        return tokens * self._quickest_s

    def _rounded(self, tokens: int) -> int:
        return 0 if tokens < LEAST else min(tokens // GRAIN * GRAIN or tokens // 2 * 2, self._most)
