"""Drafts by prompt lookup: what followed the newest tokens when they stood in the prompt or the answer before.

After Saxena, "Prompt Lookup Decoding" (2023): no second model, only an index of n-grams that grows with the answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from starling.engine.backends.backend import MOST_VERIFIED

#: Tokens that must have stood there before, the longest match first. A single token recurs in any text.
SIZES = (4, 3, 2)
#: Tokens of a draft: how many the first one has, and what acceptance makes of that.
FIRST, FEWEST, MOST = 4, 2, MOST_VERIFIED - 1
#: A match of so many tokens is believed while drafts are refused; each draft that is moves the least match by one.
CERTAIN = SIZES[0]


class PromptLookup:
    """Prompt and answer so far of one sequence, indexed by their n-grams; a few µs for each token.

    Length and readiness of drafts follow acceptance alone, never the clock, so that a run can be repeated: a draft that
    is taken whole doubles the next one's length, one of which nothing is taken halves it and asks for a longer match.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self._tokens = list(prompt[:-1])
        # Of each n-gram, the position after its latest occurrence.
        self._ends: list[dict[tuple[int, ...], int]] = [self._index(size) for size in SIZES]
        self._match, self._matched = 0, 0
        self._length, self._least = FIRST, SIZES[-1]
        self.push(prompt[-1])

    def push(self, token: int) -> None:
        """The text goes on with `token`."""
        tokens = self._tokens
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
        length = min(self._length, most)
        if self._matched < self._least or length < 1:
            return []
        tokens, match = self._tokens, self._match
        draft = tokens[match : match + length]
        while len(draft) < length:
            draft += draft[: length - len(draft)]
        return draft

    def judge(self, drafted: int, accepted: int) -> None:
        """Of the newest draft's `drafted` tokens the model chose the first `accepted` itself."""
        if accepted == drafted:
            self._length, self._least = min(max(2 * drafted, self._length), MOST), SIZES[-1]
        elif accepted:
            self._length = max(accepted + 1, FEWEST)
        else:
            self._length = max(drafted // 2, FEWEST)
            self._least = min(self._least + 1, CERTAIN)

    def _index(self, size: int) -> dict[tuple[int, ...], int]:
        columns = (self._tokens[first:] for first in range(size))
        return {ngram: end for end, ngram in enumerate(zip(*columns, strict=False), size)}
