"""How likely given continuations are after a prompt: the prompt is prefilled once, on one row of the cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from starling.engine.backends.backend import Backend, chunk_length
from starling.engine.backends.logits import Logits, check_finite
from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import PromptError
from starling.engine.generation.prompts import Prompt, check_count, checked_ids, common_prefix
from starling.engine.generation.sampler import TokenLogprob, logprobs
from starling.engine.generation.sequence import token_logprobs

Ids = tuple[int, ...]
#: Tokens of a prompt that are prefilled anew where the row holds more: a run of one token alone rounds differently.
_LEAST_PREFILLED = 2


@dataclass(frozen=True, slots=True)
class ContinuationScore:
    """Natural-log probabilities of one continuation's tokens after the prompt and each other."""

    tokens: tuple[TokenLogprob, ...]
    #: Whether each token is the model's likeliest, the lowest id of equals: what greedy decoding would have said.
    is_greedy: bool

    @property
    def logprob(self) -> float:
        """Log-probability of the whole continuation."""
        return sum(entry.logprob for entry in self.tokens)


class ContinuationScorer:
    """Scores on row 0 of a backend. What the row holds is remembered, so that prompts share their beginnings."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        #: Ids that the row's cache surely holds.
        self._held: Ids = ()
        #: The newest prompt, and the logits [vocab] after it, with the likeliest token.
        self._prompt: Ids = ()
        self._after_prompt: tuple[Logits, int] | None = None

    def score(self, prompt: Ids, continuation: Ids, top: int) -> ContinuationScore:
        """Score one continuation, of at least one token. Raises BackendError.

        The logits after the prompt serve every continuation of it, those of a single token alone.
        """
        logits, likeliest = self._run_prompt(prompt)
        entries, greedy = [logprobs(logits, continuation[0], top)], [likeliest]
        first = 0
        while first < len(continuation) - 1:
            left = len(continuation) - 1 - first
            chunk = continuation[first : first + chunk_length(left, self._backend.most_scored)]
            start = len(prompt) + first
            self._held = self._held[:start]
            output = self._backend.score(0, np.array(chunk, np.int64), start)
            self._held += chunk
            greedy += output.tokens()
            entries += token_logprobs(output, continuation[first + 1 : first + 1 + len(chunk)], top)
            first += len(chunk)
        return ContinuationScore(tuple(entries), tuple(greedy) == continuation)

    def _run_prompt(self, prompt: Ids) -> tuple[Logits, int]:
        if self._after_prompt is not None and prompt == self._prompt:
            return self._after_prompt
        start = max(0, min(common_prefix(self._held, prompt), len(prompt) - _LEAST_PREFILLED))
        self._held, self._after_prompt = prompt[:start], None
        output = self._backend.prefill(0, np.array(prompt[start:], np.int64), start)
        likeliest, logits = output.tokens()[0], output.logits()[0]
        check_finite(logits[likeliest])
        self._held = self._prompt = prompt
        self._after_prompt = logits.copy(), likeliest
        return self._after_prompt


def scored_pair(
    prompt: Prompt,
    continuation: Prompt,
    place: str,
    encode: Callable[[str], list[int]],
    bundle: Bundle,
    max_seq: int,
) -> tuple[Ids, Ids]:
    """A prompt and its continuation as token ids: of texts those of both together, cut where they differ from the
    prompt's own.

    Raises PromptError, which calls the continuation by its `place`, for what cannot be scored.
    """
    if len(continuation) == 0:
        raise PromptError(f"{place} is empty", detail="give at least one token", field="continuations")
    ids = tuple(encode(prompt)) if isinstance(prompt, str) else tuple(prompt)
    if not isinstance(continuation, str):
        rest = checked_ids(continuation, bundle, max_seq)
    elif isinstance(prompt, str):
        whole = tuple(encode(prompt + continuation))
        if len(whole) < 2:
            problem = f"the prompt and {place} are one token together"
            raise PromptError(problem, detail="give a longer prompt, or token ids", field="continuations")
        cut = max(1, min(common_prefix(whole, ids), len(whole) - 1))
        ids, rest = whole[:cut], whole[cut:]
    else:
        raise PromptError(f"{place} is a text, but the prompt is token ids", detail="give ids for both")
    # The last token's logits are not needed, so it takes no place in the cache.
    check_count(len(ids) + len(rest) - 1, bundle, max_seq)
    return checked_ids(ids, bundle, max_seq), rest
