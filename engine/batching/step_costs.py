"""What steps of a scheduler take, learned from the steps themselves: a quiet one, and what tokens beside it add."""

from __future__ import annotations

import numpy as np

#: Weight of the newest step in the running means.
NEWEST = 0.25
#: What took more than so many times its prediction was held up by something else; it counts as so much.
OUTLIER = 3
#: Of what was observed before, how much counts at the next observation.
KEPT = 0.95
#: How strongly each coefficient stays what it was: where lengths hardly vary, noise would make them. Of the very first
#: observation about half goes to the base, half to the tokens.
INERTIA = np.diag([0.1, 0.3, 16.0, 64.0])
#: How much of the longest length is forgotten with each that is shorter.
FORGOTTEN = 0.05
#: Tokens that may be tried whatever was observed of late.
FIRST_TRIED = 8
#: How much of a cost is forgotten with each step that does nothing because of it.
RELAXED = 0.01
#: A quiet step is measured again after so many that were not.
STALE = 64
#: Of a quiet step, what a drafted token is taken to cost before any was verified.
FIRST_SLOPE = 1 / 16
#: Tokens of a second with drafts, as many times as without, from which on they are verified: below that the estimate's
#: own error is as large as the gain.
LEAST_GAIN = 1.05


class ExtraCost:
    """Seconds that n tokens at a position p add to a decode step: (1, p, n, n * p) times four coefficients, p in 1,024.

    A pass over the keys before them, which one token pays as many do, and each token's own. Least squares over the
    newest observations, exponentially weighted; each coefficient is at least 0.
    """

    def __init__(self) -> None:
        self._squares, self._products = np.zeros((4, 4)), np.zeros(4)
        self._found = np.zeros(4)
        #: Mean error of the predictions, in seconds.
        self._error = 0.0
        #: Tokens of the longest observation, forgotten slowly.
        self._longest = 0.0

    @property
    def known(self) -> bool:
        """Whether anything was observed."""
        return self._longest > 0

    def base(self, position: float) -> float:
        """Seconds that any tokens at a position add beside their own."""
        return float(self._found[0] + self._found[1] * position / 1024)

    def slope(self, position: float) -> float:
        """Seconds of one more token at a position."""
        return float(self._found[2] + self._found[3] * position / 1024)

    def predict(self, tokens: int, position: float) -> float:
        """Seconds that so many tokens add."""
        return self.base(position) + tokens * self.slope(position) if tokens else 0.0

    def observe(self, tokens: int, position: float, seconds: float) -> None:
        """So many tokens, in the middle at this position, have added so many seconds."""
        if self._longest:
            expected = self.predict(tokens, position)
            seconds = min(max(seconds, 0.0), OUTLIER * expected) if expected else max(seconds, 0.0)
            self._error += NEWEST * (abs(seconds - expected) - self._error)
        self._longest = max(tokens, (1 - FORGOTTEN) * self._longest)
        given = np.array([1.0, position / 1024, tokens, tokens * position / 1024])
        self._squares = KEPT * self._squares + np.outer(given, given)
        self._products = KEPT * self._products + given * seconds
        found = np.linalg.solve(self._squares + INERTIA, self._products + INERTIA @ self._found)
        self._found = np.maximum(found, 0.0)

    def relax(self, share: float = RELAXED) -> None:
        """Nothing was tried because of what this says: it becomes a little less, so that it is tried again."""
        self._found *= 1 - share

    def fitting(self, seconds: float, position: float) -> int:
        """The most tokens that are likely to add at most so much; at most twice as many as were observed of late,
        since what lies far from that is only guessed.
        """
        if not self._longest:
            return 0
        most, left = max(int(2 * self._longest), FIRST_TRIED), seconds - self._error - self.base(position)
        slope = self.slope(position)
        if left <= 0:
            return 0
        return most if left >= most * slope else int(left / slope)


class StepCosts:
    """Of a decode step by its rows, and of the tokens that run beside it: those of prompts, and those of drafts."""

    def __init__(self) -> None:
        #: Seconds of a decode step that no chunk went before, by its rows, and quiet steps' age in other steps.
        self._quiet_s: dict[int, float] = {}
        self._age = 0
        #: A decode step right after a separate chunk takes so many times a quiet one (cold caches).
        self.after_chunk = 1.0
        self.prompts, self.drafts = ExtraCost(), ExtraCost()

    def decoded(self, rows: int, seconds: float, *, after_chunk: bool) -> None:
        """A decode step of so many live rows, and nothing beside it, took so long."""
        self._age = 0
        quiet = self._quiet_s.get(rows)
        if quiet is None:
            self._quiet_s[rows] = seconds / self.after_chunk if after_chunk else seconds
        elif after_chunk:
            self.after_chunk = max(1.0, self.after_chunk + NEWEST * (seconds / quiet - self.after_chunk))
        else:
            self._quiet_s[rows] = quiet + NEWEST * (min(seconds, OUTLIER * quiet) - quiet)

    def mixed(self, rows: int, seconds: float, *, prompt: int, position: float, drafted: int) -> None:
        """A step of so many live rows took so long with tokens of prompts and of drafts beside them."""
        self._age += 1
        quiet = self.quiet_s(rows)
        if quiet is None:
            return
        if not prompt:
            # The first one has nothing else to be held against.
            most = seconds if self.drafts.known else OUTLIER * drafted * quiet * FIRST_SLOPE
            self.drafts.observe(drafted, 0.0, min(seconds - quiet, most))
        else:
            self.prompts.observe(prompt, position, seconds - quiet - self.drafts.predict(drafted, 0.0))

    def quiet_s(self, rows: int) -> float | None:
        """Seconds of a quiet step of so many rows, or of the nearest number that is known; None where none is."""
        quiet = self._quiet_s.get(rows)
        if quiet is None and self._quiet_s:
            quiet = self._quiet_s[min(self._quiet_s, key=lambda known: abs(known - rows))]
        return quiet

    def drafted_s(self, quiet: float) -> float:
        """Seconds that one more drafted token adds to a step, whose quiet time is given."""
        return self.drafts.slope(0.0) if self.drafts.known else quiet * FIRST_SLOPE

    def wants_quiet(self, rows: int) -> bool:
        """Whether a step with nothing beside it must say what others are measured against."""
        return self._age >= STALE or rows not in self._quiet_s
