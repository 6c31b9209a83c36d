"""Drafts: tokens that are likely to come, which one run of the model verifies in place of one run each.

Exact: each token is chosen from the logits after the tokens before it, by the same sampler and in the same order as
without drafts, and the draft only says how many of a run's choices can be used. What was written to the cache after the
last one that was taken is overwritten by the next step.
"""

from __future__ import annotations

from collections.abc import Sequence

from starling.engine.backends.backend import Backend
from starling.engine.batching.draft_model import DraftModel
from starling.engine.batching.request import Request
from starling.engine.batching.step_costs import LEAST_GAIN, StepCosts
from starling.engine.errors import UserError
from starling.engine.generation.prompt_lookup import PromptLookup
from starling.engine.names import SPECULATIONS, Speculation


def checked_speculation(name: str | None, backend: Backend, *, has_draft: bool = False) -> Speculation | None:
    """The method called `name`, None for none. Raises UserError for an unknown one, and for "draft-model" where the
    engine has no draft; BackendError where none can run.
    """
    if name is None:
        return None
    for known in SPECULATIONS:
        if name == known:
            backend.check_verifies()
            if known == "draft-model" and not has_draft:
                raise UserError(
                    "speculation is 'draft-model', but no draft is there: open the engine with draft=BUNDLE"
                )
            return known
    raise UserError(f"speculation is {name!r}: give None, or one of {', '.join(SPECULATIONS)}")


def begin_drafts(request: Request) -> None:
    """The request's prompt is written and its first token chosen: drafts may come from now on."""
    sequence = request.sequence
    request.lookup = PromptLookup([*sequence.prompt, sequence.tokens[-1]])


def write_drafts(requests: Sequence[Request], costs: StepCosts, most: int, *, least_gain: float = LEAST_GAIN) -> int:
    """Give each request its draft, of which all have at most `most` tokens together; returns how many they have.

    Drafts get the tokens that bring most for what they cost: the likeliest is taken first, and the next one as long as
    the tokens of a second become more by it, as the steps until now say.
    """
    chances = [_foretell(request, most) for request in requests]
    lengths = _worthwhile(chances, costs, most, least_gain)
    for request, length in zip(requests, lengths, strict=True):
        del request.draft[length:]
    return sum(lengths)


def model_drafts(requests: Sequence[Request], costs: StepCosts, most: int, draft: DraftModel) -> int:
    """Have the draft model give each request its draft, of at most `most` tokens together; how many they have."""
    for request, tokens in zip(requests, draft.draft(requests, costs, most), strict=True):
        request.draft = tokens
        if request.sequence.grammar is not None:
            request.draft, _ = request.sequence.grammar.draft(tokens, len(tokens))
        if not request.draft:
            draft.judge(request, 0, 0)
    return sum(len(request.draft) for request in requests)


def _foretell(request: Request, most: int) -> list[float]:
    """Write all that may come next into `request.draft`; how likely it is right up to each token.

    A draft never reaches past the last token that may come, so neither past the end of the cache.
    """
    sequence, lookup = request.sequence, request.lookup
    most_left = min(sequence.limit - len(sequence.tokens) - 1, most)
    request.draft = [] if lookup is None else lookup.draft(most_left)
    if sequence.grammar is not None:
        request.draft, forced = sequence.grammar.draft(request.draft, most_left)
        if forced:
            return [1.0] * len(request.draft)
    return [] if lookup is None or not request.draft else lookup.chances(len(request.draft))


def _worthwhile(chances: Sequence[list[float]], costs: StepCosts, most: int, least_gain: float) -> list[int]:
    """How many tokens of each draft to verify."""
    lengths, quiet = [0] * len(chances), costs.quiet_s(len(chances))
    ranks = sorted(((-chance, row) for row, theirs in enumerate(chances) for chance in theirs))
    if quiet is None or not ranks:
        return lengths
    drafts = costs.drafts
    slope = costs.drafted_s(quiet)
    expected, seconds = float(len(chances)), quiet + drafts.base(0.0)
    for chance, row in ranks[:most]:
        if -chance * seconds <= slope * expected:
            break
        expected, seconds = expected - chance, seconds + slope
        lengths[row] += 1
    if expected * quiet > least_gain * len(chances) * seconds:
        return lengths
    drafts.relax()
    return [0] * len(chances)
