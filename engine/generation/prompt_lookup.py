"""Drafts by prompt lookup: what followed the newest tokens when they stood in the prompt or the answer before.

After Saxena, "Prompt Lookup Decoding" (2023): no second model, only an index of n-grams that grows with the answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from starling.engine.backends.backend import MOST_VERIFIED

#: Tokens that must have stood there before, the longest match first. A single token recurs in any text.
SIZES = (4, 3, 2)
#: Tokens of a draft at most.
MOST = MOST_VERIFIED - 1
#: Levels of trust: a match of so many tokens, those counted that it foretold rightly; and how likely the next token is
#: the right one before anything is known. What a sequence's own text says replaces that within a few tokens.
LEVELS = ((2, 0.3), (3, 0.5), (4, 0.65), (6, 0.8), (10, 0.9))
#: The level of a match of so many tokens.
LEVEL_OF = tuple(sum(size >= least for least, _ in LEVELS[1:]) for size in range(LEVELS[-1][0] + 1))
#: How many tokens what is assumed counts for, and how much of the past counts at the next token of a level.
ASSUMED, KEPT = 2.0, 0.9


class PromptLookup:
    """Prompt and answer so far of one sequence, indexed by their n-grams; a few µs for each token.

    Each new token shows whether the match before it foretold it, drafted or not: how far a draft may be trusted is
    learned without running one.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self._tokens = list(prompt[:-1])
        # Of each n-gram, the position after its latest occurrence.
        self._ends: list[dict[tuple[int, ...], int]] = [self._index(size) for size in SIZES]
        self._match, self._matched = 0, 0
        #: Tokens in a row that the match before them foretold.
        self._streak = 0
        self._right = [ASSUMED * assumed for _, assumed in LEVELS]
        self._seen = [ASSUMED] * len(LEVELS)
        self.push(prompt[-1])

    def push(self, token: int) -> None:
        """The text goes on with `token`."""
        tokens = self._tokens
        if self._matched:
            self._learn(tokens[self._match] == token)
        tokens.append(token)
        end, self._matched = len(tokens), 0
        for size, ends in zip(SIZES, self._ends, strict=True):
            if size > end:
                continue
            newest = tuple(tokens[end - size :])
            if not self._matched and (found := ends.get(newest)) is not None:
                self._match, self._matched = found, size
            ends[newest] = end

    def draft(self, most: int) -> list[int]:
        """What may come next, at most `most` tokens; [] where nothing is known.

        A text that repeats itself with a period shorter than the draft is taken to go on so.
        """
        length = min(MOST, most)
        if not self._matched or length < 1:
            return []
        tokens, match = self._tokens, self._match
        draft = tokens[match : match + length]
        while len(draft) < length:
            draft += draft[: length - len(draft)]
        return draft

    def chances(self, length: int) -> list[float]:
        """How likely a draft of so many tokens is right up to each of them."""
        size, chance, found = self._matched + self._streak, 1.0, []
        for ahead in range(length):
            level = LEVEL_OF[min(size + ahead, len(LEVEL_OF) - 1)]
            chance *= self._right[level] / self._seen[level]
            found.append(chance)
        return found

    def _learn(self, is_right: bool) -> None:
        level = LEVEL_OF[min(self._matched + self._streak, len(LEVEL_OF) - 1)]
        self._right[level] = KEPT * self._right[level] + is_right
        self._seen[level] = KEPT * self._seen[level] + 1
        self._streak = self._streak + 1 if is_right else 0

    def _index(self, size: int) -> dict[tuple[int, ...], int]:
        columns = (self._tokens[first:] for first in range(size))
        return {ngram: end for end, ngram in enumerate(zip(*columns, strict=False), size)}
