"""Drafts: tokens that are likely to come, which one run of the model verifies in place of one run each.

Exact: each token is chosen from the logits after the tokens before it, by the same sampler and in the same order as
without drafts, and the draft only says how many of a run's choices can be used. What was written to the cache after the
last one that was taken is overwritten by the next step.
"""

from __future__ import annotations

from collections.abc import Sequence

from starling.engine.backends.backend import MOST_VERIFIED, MOST_VERIFIED_TOGETHER, Backend
from starling.engine.batching.request import Request
from starling.engine.errors import UserError
from starling.engine.generation.prompt_lookup import PromptLookup
from starling.engine.names import SPECULATIONS, Speculation

#: Share of a run's places for drafts that must have one: the others cost as much and give nothing. Four streams of
#: SmolLM2 int8 give 1.22 times the tokens a second with 0.5 on texts that repeat themselves and 0.93 on others, and
#: 0.82 and 0.86 without a bound (profiling/load/served_speculation.py).
WORTHWHILE = 0.5


def checked_speculation(name: str | None, backend: Backend) -> Speculation | None:
    """The method called `name`, None for none. Raises UserError for an unknown one, BackendError where none can run."""
    if name is None:
        return None
    for known in SPECULATIONS:
        if name == known:
            backend.check_verifies()
            return known
    raise UserError(f"speculation is {name!r}: give None, or one of {', '.join(SPECULATIONS)}")


def begin_drafts(request: Request) -> None:
    """The request's prompt is written and its first token chosen: drafts may come from now on."""
    sequence = request.sequence
    request.lookup = PromptLookup([*sequence.prompt, sequence.tokens[-1]])


def write_drafts(requests: Sequence[Request], rows: int, most: int) -> int:
    """Give each request a draft of at most `most` tokens; returns the length of the longest.

    A draft never reaches past the last token that may come, so neither past the end of the cache. A run verifies
    equally many tokens of each of its `rows`: drafts are cut until a WORTHWHILE share of the places has one.
    """
    for request in requests:
        sequence = request.sequence
        most_left = min(sequence.limit - len(sequence.tokens) - 1, most)
        request.draft = [] if request.lookup is None else request.lookup.draft(most_left)
        if sequence.grammar is not None:
            request.draft, request.forced = sequence.grammar.draft(request.draft, most_left)
    longest = max(len(request.draft) for request in requests)
    while longest and sum(min(len(request.draft), longest) for request in requests) < WORTHWHILE * rows * longest:
        longest -= 1
    for request in requests:
        del request.draft[longest:]
    return longest


def longest_draft(rows: int, room: int) -> int:
    """Tokens that a draft of each of so many rows may have, where the fullest of them has `room` positions left."""
    return min(MOST_VERIFIED, MOST_VERIFIED_TOGETHER // rows, room) - 1
