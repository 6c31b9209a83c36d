"""Decoding by drafts: tokens that are likely to come are verified in one run of the model, in place of one run each.

Exact: each token is chosen from the logits behind the tokens before it, by the same sampler and in the same order as
without drafts, and the draft only says how many of a run's rows can be used. What was written to the cache behind the
last one taken is overwritten by the next step.
"""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter
from typing import Literal, get_args

from starling.engine.backend import Backend, StepOutput
from starling.engine.errors import UserError
from starling.engine.prompt_lookup import PromptLookup
from starling.engine.sampling import check_finite
from starling.engine.sequence import GenerationSequence, accept

#: Where drafts come from.
Speculation = Literal["prompt-lookup"]


def checked_speculation(name: str | None, backend: Backend) -> Speculation | None:
    """The method called `name`, None for none. Raises UserError for an unknown one, BackendError where none can run."""
    if name is None:
        return None
    for known in get_args(Speculation):
        if name == known:
            backend.check_verifies()
            return "prompt-lookup"
    raise UserError(f"speculation is {name!r}: give None, or one of {', '.join(get_args(Speculation))}")


def decode_drafts(backend: Backend, sequence: GenerationSequence) -> Iterator[None]:
    """Decode the prefilled sequence of row 0 to its end; yields behind each token.

    Tokens of one run are taken one by one as they are asked for: whoever stops reading ends the sequence there.
    """
    lookup = PromptLookup([*sequence.prompt, sequence.tokens[-1]])
    while sequence.finish_reason is None:
        begin, model_begin = perf_counter(), backend.model_seconds
        # A draft never reaches behind the last token that may come, so neither behind the end of the cache.
        draft = lookup.draft(sequence.limit - len(sequence.tokens) - 1)
        output = _run(backend, sequence, draft)
        sequence.drafted += len(draft)
        accepted = 0
        for _ in _take(sequence, output, draft, lookup):
            seconds = perf_counter() - begin
            sequence.itl_s.append(seconds)
            sequence.host_s.append(seconds - (backend.model_seconds - model_begin))
            yield
            accepted += 1
            begin, model_begin = perf_counter(), backend.model_seconds
        if draft:
            lookup.judge(len(draft), accepted - 1)


def _run(backend: Backend, sequence: GenerationSequence, draft: list[int]) -> StepOutput:
    """Write the newest token, and the draft behind it."""
    newest, position = sequence.tokens[-1], len(sequence.prompt) + len(sequence.tokens) - 1
    return backend.verify(0, [newest, *draft], position) if draft else backend.decode((newest,), (position,))


def _take(sequence: GenerationSequence, output: StepOutput, draft: list[int], lookup: PromptLookup) -> Iterator[None]:
    """Take the run's tokens, as far as the draft was right; yields behind each of them."""
    logits = output.logits() if sequence.needs_logits else None
    for row, token in enumerate(output.choices()):
        if token < 0:
            check_finite(output.logits()[row].max())
        token = accept(sequence, token, None if logits is None else logits[row])
        lookup.push(token)
        right = row < len(draft) and token == draft[row]
        sequence.accepted += right
        yield
        if not right or sequence.finish_reason is not None:
            return
