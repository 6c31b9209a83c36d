"""A draft model: a smaller model of the same tokenizer says what may come, and the target verifies it.

After Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (2023), with the rule of acceptance
of `speculation`: the target chooses each token itself, and a draft only says how many of a run's choices can be used.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from time import perf_counter

import numpy as np

from starling.engine.backends.backend import Backend, RowPart
from starling.engine.batching.prefix_store import PrefixStore
from starling.engine.batching.request import Request
from starling.engine.batching.step_costs import LEAST_GAIN, NEWEST, OUTLIER, StepCosts
from starling.engine.errors import BackendError
from starling.engine.generation.prompts import common_prefix

LOGGER = logging.getLogger(__name__)

#: Tokens of a draft at most.
MOST = 8
#: How likely a drafted token is right before anything is known, and how much of the past counts at the next draft.
ASSUMED, KEPT = 0.7, 0.85
#: How much of the way back to what is assumed a row's chance goes with each token that is not drafted: so that a row
#: that was given up is tried again, about every hundredth token.
RECOVERED = 0.01
#: Tokens of a row with which a run takes as long as with one.
FEW = 2


class DraftModel:
    """A backend whose rows are those of the target's, each with what it holds. One thread uses it."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        #: Known prefixes in its own cache; set by whoever keeps those of the target.
        self.prefixes: PrefixStore | None = None
        #: Tokens whose keys and values each row holds, from its beginning.
        self._held: list[list[int]] = [[] for _ in range(backend.max_batch)]
        #: How likely the next drafted token of each row is right.
        self._chances = [ASSUMED] * backend.max_batch
        #: Seconds of one run that drafts a token for so many rows.
        self._run_s: dict[int, float] = {}

    def begin(self, request: Request, source: Request | None) -> None:
        """A request got a row; `source` is another one whose prompt it shares."""
        row, prompt = request.row, request.sequence.prompt
        self._chances[row] = ASSUMED
        held = self._held[row]
        del held[common_prefix(held, prompt) :]
        if self.prefixes is None:
            return
        if source is not None:
            shared = common_prefix(self._held[source.row], prompt)
            self.prefixes.copies.fork(source.row, row, shared)
            self._held[row] = list(prompt[:shared])
        elif self.prefixes.known(request) > len(held):
            self._held[row] = list(prompt[: self.prefixes.load(request)])

    def follow(self, request: Request, written: int) -> None:
        """The target's row holds so many tokens of the prompt: so does this one's from now on, if it does not fail."""
        held, prompt = self._held[request.row], request.sequence.prompt
        if len(held) >= written:
            return
        try:
            self.backend.prefill(request.row, np.array(prompt[len(held) : written], np.int64), len(held))
        except BackendError as error:
            LOGGER.warning("the draft model has failed with a prompt, whose request goes on: %s", error)
            self.forget()
        else:
            held.extend(prompt[len(held) : written])

    def end(self, request: Request) -> None:
        """The request leaves its row."""
        if self.prefixes is not None:
            held, known = self._held[request.row], request.sequence.cached_ids()
            self.prefixes.save(known[: common_prefix(held, known)], request)

    def forget(self) -> None:
        """Nothing is known of what the rows hold: a run has failed."""
        for held in self._held:
            held.clear()

    def lengths(self, requests: Sequence[Request], costs: StepCosts, most: int) -> list[int]:
        """How many tokens to draft for each request, `most` together: as many as make the tokens of a second more."""
        rooms = [request.sequence.limit - len(request.sequence.tokens) - 1 for request in requests]
        chances = [self._chances[request.row] for request in requests]
        lengths = draft_lengths(chances, rooms, costs, most, self._run_seconds(len(requests)))
        if not any(lengths):
            for rows in self._run_s:  # so that it is tried again
                self._run_s[rows] *= 1 - RECOVERED
        return lengths

    def _run_seconds(self, rows: int) -> float:
        """Seconds of one run for so many rows, or for the nearest number that is known; 0 where none is."""
        if not self._run_s:
            return 0.0
        return self._run_s[min(self._run_s, key=lambda known: abs(known - rows))]

    def judge(self, request: Request, drafted: int, accepted: int) -> None:
        """Of so many drafted tokens the target chose the first `accepted` itself; of none a little is forgotten."""
        row = request.row
        if not drafted:
            self._chances[row] += RECOVERED * (ASSUMED - self._chances[row])
        for number in range(min(accepted + 1, drafted)):
            self._chances[row] = KEPT * self._chances[row] + (1 - KEPT) * (number < accepted)

    def draft(self, requests: Sequence[Request], lengths: Sequence[int]) -> list[list[int]]:
        """Tokens that are likely to come, so many for each request at most: one run for each further token.

        Raises BackendError as the backend does; what the rows hold is forgotten then.
        """
        drafts: list[list[int]] = [[] for _ in requests]
        parts = [self._missing(request) for request in requests]
        try:
            for ahead in range(max(lengths, default=0)):
                drafting = [i for i, length in enumerate(lengths) if length > ahead and len(drafts[i]) == ahead]
                begin, is_even = perf_counter(), all(len(parts[i].tokens) <= FEW for i in drafting)
                chosen = self._run([parts[i] for i in drafting])
                if is_even:
                    self._took(len(requests), perf_counter() - begin)
                for i, token in zip(drafting, chosen, strict=True):
                    row, start, tokens = parts[i]
                    self._held[row] += tokens
                    if token >= 0:
                        drafts[i].append(token)
                        parts[i] = RowPart(row, start + len(tokens), [token])
        except Exception:
            self.forget()
            raise
        return drafts

    def _took(self, rows: int, seconds: float) -> None:
        before = self._run_s.setdefault(rows, seconds)
        self._run_s[rows] = before + NEWEST * (min(seconds, OUTLIER * before) - before)

    def _missing(self, request: Request) -> RowPart:
        """What the request's row does not hold yet, the newest token among it."""
        sequence, held = request.sequence, self._held[request.row]
        prompt, tokens = sequence.prompt, sequence.tokens
        # What was drafted before the newest token and not taken is written over.
        first, right = len(prompt), len(prompt)
        while right < len(held) and right - first < len(tokens) - 1 and held[right] == tokens[right - first]:
            right += 1
        del held[right:]
        start = len(held)
        return RowPart(request.row, start, [*prompt[start:], *tokens[max(start - first, 0) :]])

    def _run(self, parts: list[RowPart]) -> list[int]:
        """The likeliest token after each part; -1 where its logits are not finite."""
        backend = self.backend
        if sum(len(part.tokens) for part in parts) <= backend.most_mixed:
            ordered = sorted(range(len(parts)), key=lambda i: parts[i].row)
            ends = np.cumsum([len(parts[i].tokens) for i in ordered])
            chosen = backend.mix([parts[i] for i in ordered], [int(end) - 1 for end in ends]).tokens()
            by_part = dict(zip(ordered, chosen, strict=True))
            return [by_part[i] for i in range(len(parts))]
        return [backend.prefill(row, np.array(tokens, np.int64), start).tokens()[-1] for row, start, tokens in parts]


def draft_lengths(
    chances: Sequence[float], rooms: Sequence[int], costs: StepCosts, most: int, run_s: float
) -> list[int]:
    """How many tokens to draft for each row, `most` together and `rooms` of each.

    `chances` say how likely the next token of a row is right; each further token of all rows takes one run of the draft
    of `run_s` seconds, and each token what verifying it adds to a step.
    """
    lengths, quiet = [0] * len(chances), costs.quiet_s(len(chances))
    if quiet is None:
        return lengths
    slope = costs.drafted_s(quiet)
    expected, seconds = float(len(chances)), quiet + costs.drafts.base(0.0)
    best, chosen = LEAST_GAIN * len(chances) / quiet, list(lengths)
    for ahead in range(1, MOST + 1):
        seconds += run_s
        for row, chance in enumerate(chances):
            is_open = lengths[row] == ahead - 1 and ahead <= rooms[row] and sum(lengths) < most
            if is_open and chance**ahead * seconds > slope * expected:
                lengths[row], expected, seconds = ahead, expected + chance**ahead, seconds + slope
        if expected / seconds > best:
            best, chosen = expected / seconds, list(lengths)
    return chosen
