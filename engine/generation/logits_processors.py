"""What changes a row's logits before a token is chosen from them: masks, biases and penalties.

A processor edits a copy of the logits in place and hears of each token that was chosen. They run in vLLM's order: bad
words, minimum of tokens, bias, repetition penalty, frequency and presence penalty; then those that the caller brings, a
grammar's mask for example; then temperature, top-k, top-p and min-p (`sampler.py`). transformers' `generate` has the
same order but for its masks, which come last there; what is masked stays masked either way. Of a draft every position
is chosen in its turn, after the tokens before it were told: so drafts change nothing here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from starling.engine.backends.logits import Logits
from starling.engine.errors import SamplingError
from starling.engine.generation.sampling_params import SamplingParams
from starling.engine.text.tokenizer import Tokenizer

#: Logit of a token that cannot be chosen.
MASKED = np.float32(-np.inf)


class LogitsProcessor(Protocol):
    """One sequence's; it may keep state."""

    def __call__(self, logits: Logits, /) -> None:
        """Change the logits [vocab] float32, a copy, in place, before the sequence's next token is chosen."""
        ...

    def accept(self, token: int, /) -> None:
        """The sequence has this token next."""
        ...


def logits_processors(
    params: SamplingParams, prompt: Sequence[int], tokenizer: Tokenizer, *, end_ids: Sequence[int], vocab_size: int
) -> list[LogitsProcessor]:
    """The processors that `params` ask for, in their order; [] where the logits stay as they are.

    `end_ids` end the sequence. Raises SamplingError for a bias or bad word of tokens that the model does not have.
    """
    found: list[LogitsProcessor] = []
    if params.bad_words:
        found.append(BadWords(bad_word_ids(params.bad_words, tokenizer, vocab_size)))
    ends = [token for token in end_ids if token < vocab_size]
    if params.min_tokens and ends:
        found.append(MinTokens(params.min_tokens, ends))
    if params.logit_bias:
        found.append(LogitBias(dict(params.logit_bias), vocab_size))
    if params.repetition_penalty != 1:
        found.append(RepetitionPenalty(params.repetition_penalty, prompt))
    if params.presence_penalty or params.frequency_penalty:
        found.append(CountPenalty(params.presence_penalty, params.frequency_penalty))
    return found


def bad_word_ids(words: Sequence[str], tokenizer: Tokenizer, vocab_size: int) -> list[tuple[int, ...]]:
    """The token sequences of texts that must not appear, as vLLM takes them: at the beginning, and after a space.

    Raises SamplingError for a text without tokens, or with tokens that the model does not have.
    """
    found: dict[tuple[int, ...], None] = {}
    for index, word in enumerate(words):
        alone, spaced = (
            tuple(tokenizer.encode(space + word.lstrip(), add_special_tokens=False)) for space in ("", " ")
        )
        if not alone or max(*alone, *spaced) >= vocab_size:
            problem = f"bad_words[{index}] is no text that the model could write: leave it out"
            raise SamplingError(problem, field="bad_words")
        found[alone] = None
        if spaced[0] != alone[0] and len(spaced) == len(alone):
            found[spaced] = None
    return list(found)


class BadWords:
    """Masks each token that would complete a forbidden sequence within the answer."""

    def __init__(self, sequences: Sequence[tuple[int, ...]]) -> None:
        """`sequences` of one or more token ids."""
        self._single = np.array([ids[0] for ids in sequences if len(ids) == 1], np.int64)
        #: Of the others, by the token before the last: the tokens up to that, and the last.
        self._longer: dict[int, list[tuple[list[int], int]]] = {}
        for *start, last in (ids for ids in sequences if len(ids) > 1):
            self._longer.setdefault(start[-1], []).append((start, last))
        self._answer: list[int] = []

    def __call__(self, logits: Logits, /) -> None:
        """Mask what must not come next."""
        logits[self._single] = MASKED
        answer = self._answer
        for start, last in self._longer.get(answer[-1], ()) if answer else ():
            if answer[-len(start) :] == start:
                logits[last] = MASKED

    def accept(self, token: int, /) -> None:
        """Remember it."""
        self._answer.append(token)


class MinTokens:
    """Masks the tokens that end the sequence until it has as many as it must."""

    def __init__(self, least: int, end_ids: Sequence[int]) -> None:
        """`least` tokens come before one of `end_ids`."""
        self._left, self._ends = least, np.array(end_ids, np.int64)

    def __call__(self, logits: Logits, /) -> None:
        """Mask them while tokens are missing."""
        if self._left > 0:
            logits[self._ends] = MASKED

    def accept(self, token: int, /) -> None:
        """Count it."""
        self._left -= 1


class LogitBias:
    """Adds a number to the logits of some tokens."""

    def __init__(self, biases: Mapping[int, float], vocab_size: int) -> None:
        """Biases by token id. Raises SamplingError for an id outside the vocabulary."""
        for token in biases:
            if token >= vocab_size:
                problem = f"logit_bias has the token id {token}, but the model has 0 to {vocab_size - 1}"
                raise SamplingError(f"{problem}: use this model's own tokenizer", field="logit_bias")
        self._ids = np.array([*biases], np.int64)
        self._biases = np.array([*biases.values()], np.float32)

    def __call__(self, logits: Logits, /) -> None:
        """Add them."""
        logits[self._ids] += self._biases

    def accept(self, token: int, /) -> None:
        """Nothing to remember."""


class _Seen:
    """Token ids, each with how often it was seen, in arrays that grow by doubling."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._ids, self._counts = np.zeros(64, np.int64), np.zeros(64, np.float32)

    def add(self, token: int) -> None:
        place = self._places.setdefault(token, len(self._places))
        if place == self._ids.size:
            self._ids, self._counts = (
                np.concatenate([each, np.zeros_like(each)]) for each in (self._ids, self._counts)
            )
        self._ids[place] = token
        self._counts[place] += 1

    @property
    def ids(self) -> NDArray[np.int64]:
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> NDArray[np.float32]:
        return self._counts[: len(self._places)]


class RepetitionPenalty:
    """Divides positive and multiplies negative logits of every token of prompt and answer (arXiv:1909.05858)."""

    def __init__(self, penalty: float, prompt: Sequence[int]) -> None:
        """Above 1 makes those tokens less likely."""
        self._penalty, self._seen = np.float32(penalty), _Seen()
        for token in dict.fromkeys(prompt):
            self._seen.add(token)

    def __call__(self, logits: Logits, /) -> None:
        """Penalize them, each once."""
        ids = self._seen.ids
        values = logits[ids]
        logits[ids] = np.where(values < 0, values * self._penalty, values / self._penalty)

    def accept(self, token: int, /) -> None:
        """It is seen from now on."""
        self._seen.add(token)


class CountPenalty:
    """OpenAI's penalties over the answer's own tokens: presence once, frequency as often as a token was generated."""

    def __init__(self, presence: float, frequency: float) -> None:
        """Above 0 makes those tokens less likely."""
        self._presence, self._frequency, self._seen = np.float32(presence), np.float32(frequency), _Seen()

    def __call__(self, logits: Logits, /) -> None:
        """Penalize them."""
        logits[self._seen.ids] -= self._frequency * self._seen.counts + self._presence

    def accept(self, token: int, /) -> None:
        """It counts from now on."""
        self._seen.add(token)
