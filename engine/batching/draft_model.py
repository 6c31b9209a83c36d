"""A draft model: a smaller model of the same tokenizer says what may come, and the target verifies it.

After Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (2023), with the rule of acceptance
of `speculation`: the target chooses each token itself, and a draft only says how many of a run's choices can be used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from starling.engine.backends.backend import Backend, RowPart
from starling.engine.batching.prefix_store import PrefixStore
from starling.engine.batching.request import Request
from starling.engine.batching.step_costs import LEAST_GAIN, NEWEST, OUTLIER, StepCosts
from starling.engine.generation.prompts import common_prefix

LOGGER = logging.getLogger(__name__)
#: Tokens of a draft at most.
MOST = 8
#: How likely a drafted token is right before anything is known, and how much of the past counts at the next draft.
ASSUMED, KEPT = 0.7, 0.85
#: How much of the way back to what is assumed a row's chance goes with each token that is not drafted: so that a row
#: that was given up is tried again, about every hundredth token. What is known of all rows goes back slower.
RECOVERED, ALL_RECOVERED = 0.01, 0.001
#: How much of a cost is forgotten with each step that drafts nothing because of it.
RELAXED = 0.002
#: Tokens of a row with which a run takes as long as with one.
FEW = 2
#: Tokens over which the cost of what a row lacks is spread, if so many are still to come.
HORIZON = 64
#: What rows lack is written in runs of so many tokens at least and at most. Beside other rows a step has time for it
#: as long as this share of a quiet one is not used up.
LEAST_CAUGHT_UP, MOST_CAUGHT_UP, CATCH_UP = 16, 512, 0.25


@dataclass(slots=True)
class DraftedRow:
    """What a row of the draft's own cache holds, and how likely its next drafted token is right."""

    chance: float = ASSUMED
    #: Tokens whose keys and values it holds, from its beginning; the first `right` of them are the request's own.
    held: list[int] = field(default_factory=list)
    right: int = 0

    def hold(self, tokens: Sequence[int]) -> None:
        """It holds these tokens, which are a request's own."""
        self.held, self.right = list(tokens), len(tokens)

    def lacks(self, request: Request) -> int:
        """How many of the request's tokens it does not hold, the newest among them.

        What was drafted and not taken is dropped: it is written over.
        """
        sequence, held, right = request.sequence, self.held, self.right
        prompt, tokens = sequence.prompt, sequence.tokens
        first, length = len(prompt), len(prompt) + len(tokens)
        while right < min(len(held), length - 1) and held[right] == (
            prompt[right] if right < first else tokens[right - first]
        ):
            right += 1
        del held[right:]
        self.right = right
        return length - right

    def missing(self, request: Request) -> list[int]:
        """Those tokens."""
        right = self.right
        prompt, tokens = request.sequence.prompt, request.sequence.tokens
        return [*prompt[right:], *tokens[max(right - len(prompt), 0) :]]


class DraftModel:
    """A backend whose rows are those of the target's, each with what it holds. One thread uses it.

    A row holds nothing before it is first drafted for: where drafts do not pay, none of this runs. Whatever fails in it
    costs drafts, and no answer.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        #: Known prefixes in its own cache; set by whoever keeps those of the target.
        self.prefixes: PrefixStore | None = None
        self._rows = [DraftedRow() for _ in range(backend.max_batch)]
        #: How likely a drafted token is right in a row of which nothing is known.
        self._usual = ASSUMED
        #: Seconds of one run that drafts a token for so many rows, and of one token that a row lacked.
        self._run_s: dict[int, float] = {}
        self._lacked_s = 0.0

    def begin(self, request: Request, source: Request | None) -> None:
        """A request got a row; `source` is another one whose prompt it shares."""
        row, prompt = self._rows[request.row], request.sequence.prompt
        row.chance = self._usual
        row.hold(prompt[: common_prefix(row.held, prompt)])
        if self.prefixes is None:
            return
        shared = 0 if source is None else common_prefix(self._rows[source.row].held, prompt)
        with self._forgets_if_it_fails():
            if source is not None and shared > len(row.held):
                self.prefixes.copies.fork(source.row, request.row, shared)
                row.hold(prompt[:shared])
            elif self.prefixes.known(request) > len(row.held):
                row.hold(prompt[: self.prefixes.load(request)])

    def end(self, request: Request) -> None:
        """The request leaves its row."""
        if self.prefixes is not None:
            held, known = self._rows[request.row].held, request.sequence.cached_ids()
            with self._forgets_if_it_fails():
                self.prefixes.save(known[: common_prefix(held, known)], request)

    @contextmanager
    def _forgets_if_it_fails(self) -> Iterator[None]:
        """What the backend raises is a warning, whatever it is; nothing is known then of what the rows hold."""
        try:
            yield
        except Exception as error:
            LOGGER.warning("the draft model has failed, and the target goes on without it: %s", error)
            for row in self._rows:
                row.hold(())

    def lengths(
        self, requests: Sequence[Request], costs: StepCosts, most: int, late: Collection[int] = ()
    ) -> list[int]:
        """How many tokens to draft for each request, `most` together: as many as make the tokens of a second more.

        None for those whose numbers are `late`; what the others lack is written then, and costs nothing more.
        """
        rooms = [request.sequence.limit - len(request.sequence.tokens) - 1 for request in requests]
        rows = [self._rows[request.row] for request in requests]
        entries = [
            0.0 if late else self._lacked_s * max(0, row.lacks(request) - FEW) / max(1, min(room, HORIZON))
            for request, row, room in zip(requests, rows, rooms, strict=True)
        ]
        chances = [row.chance for row in rows]
        ready = [0 if i in late else room for i, room in enumerate(rooms)]
        lengths = draft_lengths(chances, ready, costs, most, self._run_seconds, entries)
        if not any(lengths):  # so that it is tried again
            costs.drafts.relax(RELAXED)
            for count in self._run_s:
                self._run_s[count] *= 1 - RELAXED
        return lengths

    def _run_seconds(self, rows: int) -> float:
        """Seconds of one run for so many rows, or for the nearest number that is known; 0 where none is."""
        if not self._run_s:
            return 0.0
        return self._run_s[min(self._run_s, key=lambda known: abs(known - rows))]

    def judge(self, request: Request, drafted: int, accepted: int) -> None:
        """Of so many drafted tokens the target chose the first `accepted` itself; of none a little is forgotten."""
        row = self._rows[request.row]
        if not drafted:
            row.chance += RECOVERED * (ASSUMED - row.chance)
            self._usual += ALL_RECOVERED * (ASSUMED - self._usual)
        for number in range(min(accepted + 1, drafted)):
            row.chance = KEPT * row.chance + (1 - KEPT) * (number < accepted)
            self._usual = KEPT * self._usual + (1 - KEPT) * (number < accepted)

    def draft(self, requests: Sequence[Request], costs: StepCosts, most: int) -> list[list[int]]:
        """Tokens that are likely to come, for each request as many as pay: one run for each further token.

        What rows lack is written by the first run, in pieces where other rows wait for it; a row that lacks nothing
        more is drafted for. None where a run fails.
        """
        lengths = self.lengths(requests, costs, most)
        if any(lengths):
            with self._forgets_if_it_fails():
                return self._draft(requests, lengths, costs, most)
        return [[] for _ in requests]

    def _draft(self, requests: Sequence[Request], lengths: list[int], costs: StepCosts, most: int) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in requests]
        parts = self._first_parts(requests, lengths, costs.quiet_s(len(requests)) or 0.0)
        late = {i for i, part in parts.items() if len(part.tokens) < self._rows[part.row].lacks(requests[i])}
        if late:
            lengths = self.lengths(requests, costs, most, late)
        ahead, running = 0, [i for i in parts if lengths[i] or i in late]
        while running:
            begin = perf_counter()
            chosen = self._run([parts[i] for i in running])
            self._took([len(parts[i].tokens) for i in running], perf_counter() - begin)
            for i, token in zip(running, chosen, strict=True):
                row, start, tokens = parts[i]
                self._rows[row].held += tokens
                if token >= 0 and i not in late:
                    drafts[i].append(token)
                    parts[i] = RowPart(row, start + len(tokens), [token])
            ahead += 1
            running = [i for i in running if len(drafts[i]) == ahead < lengths[i]]
        return drafts

    def _first_parts(self, requests: Sequence[Request], lengths: Sequence[int], quiet_s: float) -> dict[int, RowPart]:
        """Of each request with a length what its row lacks, or as much of it as there is time for, by its number."""
        left = MOST_CAUGHT_UP
        if len(requests) > 1:
            fitting = int(CATCH_UP * quiet_s / self._lacked_s) if self._lacked_s else 0
            left = max(LEAST_CAUGHT_UP, min(fitting, self.backend.most_mixed - FEW * len(requests)))
        parts = {}
        rows = [self._rows[request.row] for request in requests]
        lacking = sorted(
            (row.lacks(request), i) for i, (row, request) in enumerate(zip(rows, requests, strict=True)) if lengths[i]
        )
        for lacks, i in lacking:
            tokens = rows[i].missing(requests[i])[: lacks if lacks <= FEW else left]
            left -= 0 if lacks <= FEW else len(tokens)
            if tokens:
                parts[i] = RowPart(requests[i].row, len(rows[i].held), tokens)
        return parts

    def _took(self, tokens: Sequence[int], seconds: float) -> None:
        """A run of so many tokens of each row took so long."""
        rows, more = len(tokens), sum(tokens) - len(tokens)
        if max(tokens) > FEW:
            each = max(0.0, seconds - self._run_seconds(rows)) / more
            self._lacked_s += (each - self._lacked_s) * (NEWEST if self._lacked_s else 1)
        else:
            before = self._run_s.setdefault(rows, seconds)
            self._run_s[rows] = before + NEWEST * (min(seconds, OUTLIER * before) - before)

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
    chances: Sequence[float],
    rooms: Sequence[int],
    costs: StepCosts,
    most: int,
    run_s: Callable[[int], float],
    entries: Sequence[float],
) -> list[int]:
    """How many tokens to draft for each row, `most` together and `rooms` of each.

    `chances` say how likely the next token of a row is right; each further token takes one run of the draft, of
    `run_s(n)` seconds for the n rows that get one, and each token what verifying it adds to a step. A row's first token
    takes its `entries` seconds as well.
    """
    lengths, quiet = [0] * len(chances), costs.quiet_s(len(chances))
    if quiet is None:
        return lengths
    slope = costs.drafted_s(quiet)
    expected, seconds = float(len(chances)), quiet + costs.drafts.base(0.0)
    best, chosen = LEAST_GAIN * len(chances) / quiet, list(lengths)
    for ahead in range(1, MOST + 1):
        rows = 0
        for row, chance in enumerate(chances):
            adds = slope + (entries[row] if ahead == 1 else 0.0)
            is_open = lengths[row] == ahead - 1 and ahead <= rooms[row] and sum(lengths) < most
            if is_open and chance**ahead * seconds > adds * expected:
                lengths[row], expected, seconds, rows = ahead, expected + chance**ahead, seconds + adds, rows + 1
        if not rows:
            break
        seconds += run_s(rows)
        if expected / seconds > best:
            best, chosen = expected / seconds, list(lengths)
    return chosen
