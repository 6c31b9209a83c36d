"""Prompts on their way into the cache: what is known is copied, the rest is run, alone or beside steps of others."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from starling.engine.backends.backend import Backend, StepOutput, chunk_length
from starling.engine.backends.logits import Logits
from starling.engine.batching.draft_model import DraftModel
from starling.engine.batching.mixed_step import Piece
from starling.engine.batching.prefill_pacing import LEAST, Pace
from starling.engine.batching.prefix_store import PrefixStore
from starling.engine.batching.request import NEVER, Handout, Request
from starling.engine.batching.rows import RowTable
from starling.engine.batching.serving_stats import ServingCounters
from starling.engine.generation.results import FinishReason, GenerationChunk
from starling.engine.generation.sequence import score_prompt

#: How much higher the bound on a step is for each of several prompts that wait, per request that ran before.
CROWD = 4.0


class RequestOutcomes(Protocol):
    """What becomes of a request, as the scheduler has it; each gives the request's chunk."""

    def accept(self, request: Request, token: int, logits: Logits | None) -> GenerationChunk:
        """Its newest token, after logits [vocab] where they are on the host."""

    def fail(self, request: Request, error: Exception) -> GenerationChunk:
        """It ends by an error."""

    def end_early(self, request: Request, reason: FinishReason) -> GenerationChunk:
        """It ends for a reason that is not its text."""

    def now(self) -> float:
        """Seconds of the clock that requests are timed by."""


class Prefills:
    """The requests that have a row and are not wholly prefilled, the one whose turn it is first."""

    __slots__ = ("_backend", "_counters", "_draft_model", "_outcomes", "_pace", "_prefixes", "_rows", "requests")

    def __init__(
        self,
        outcomes: RequestOutcomes,
        backend: Backend,
        rows: RowTable,
        counters: ServingCounters,
        pace: Pace,
        prefixes: PrefixStore | None,
        draft_model: DraftModel | None,
    ) -> None:
        self._outcomes, self._backend, self._rows, self._counters = outcomes, backend, rows, counters
        self._pace, self._prefixes, self._draft_model = pace, prefixes, draft_model
        #: Those of a lower `priority` first, then by arrival. The scheduler looks at it at each step, without a call.
        self.requests: deque[Request] = deque()

    def add(self, request: Request) -> None:
        """A request got its row."""
        request.admitted = self._outcomes.now()
        place = sum(one.priority <= request.priority for one in self.requests)
        self.requests.insert(place, request)

    def is_late(self, request: Request, now: float) -> bool:
        """Whether the deadline passes before the prompt can be prefilled, even if nothing else ran."""
        known = request.written
        if not request.begun and self._prefixes is not None:
            known = self._prefixes.known(request)
        return now + self._pace.least_s(len(request.sequence.prompt) - known) >= request.deadline

    def begin_first(self) -> Iterator[Handout]:
        """Begin the first prompt, and those after ones of which nothing was left to run."""
        while self.requests and not (request := self.requests[0]).begun:
            begun = self._begin(request)
            if begun is not None:
                yield request, begun

    def piece_beside(self, request: Request, rows: int, drafted: int) -> Piece:
        """As much of a prompt as the pace has time for beside so many live rows and drafted tokens."""
        left = len(request.sequence.prompt) - request.written
        fitting = self._pace.beside(rows, self._favour(request), drafted, request.written)
        most = min(fitting, self._backend.most_mixed - rows - drafted)
        return Piece(request, chunk_length(left, max(most, 1)))

    def run_alone(self) -> Iterator[Handout]:
        """Chunks of the first prompts until the time for them is used up, at least one."""
        now = self._outcomes.now
        begin, budget, least = now(), self._pace.budget(len(self._rows.live), self._favour(self.requests[0])), LEAST
        while self.requests:
            first = self.requests[0]
            most = max(self._pace.chunk(budget - (now() - begin), first.written), least)
            if most == 0:
                return
            yield from self._run_chunk(first, most)
            least = 0
            if budget == math.inf:  # the request may decode now, or newer ones be cancelled: look again
                return

    def _favour(self, prompt: Request) -> float:
        """How many times longer than for one prompt beside running requests a step may take, for those that wait.

        Requests that decoded for less time than they had waited when the prompt got its row came with it, as after a
        burst of them, and had their turn before it: it may hold them up as it must. The others' loss is weighed
        against what all prompts gain that wait together.
        """
        came, waiting = prompt.admitted, len(self.requests)
        before = sum(one.sequence.submitted + 2 * one.sequence.ttft_s <= came for one in self._rows.live_requests)
        if not before:
            return math.inf
        return max(1.0, CROWD * waiting / before) if waiting > 1 else 1.0

    def end_piece(self, piece: Piece, token: int, logits: Logits | None) -> Iterator[Handout]:
        """A piece of a prompt is written; after the last one the backend's choice is `token`, its logits [vocab]."""
        request, sequence, is_last = piece.request, piece.request.sequence, piece.is_last
        request.written += piece.tokens
        self._counters.prompt_tokens += piece.tokens
        if is_last:
            if request.group is not None:
                request.group.keep(token, logits)
            yield request, self._end(request, token, logits)
        else:
            self._rows.hold(request)
        if self._prefixes is not None and request.row >= 0:  # else it was kept when the request ended
            self._prefixes.save(sequence.prompt[: request.written], request)

    def _run_chunk(self, request: Request, most: int) -> Iterator[Handout]:
        """One run over a piece of a prompt alone."""
        sequence, backend, now = request.sequence, self._backend, self._outcomes.now
        if not request.begun and (begun := self._begin(request)) is not None:
            yield request, begun
            return
        begin, model_begin = now(), backend.model_seconds
        left = len(sequence.prompt) - request.written
        piece = Piece(request, chunk_length(left, min(most, backend.most_scored) if request.is_scored else most))
        tokens = np.array(sequence.prompt[request.written : request.written + piece.tokens], dtype=np.int64)
        try:
            output: StepOutput
            if request.is_scored:
                output = backend.score(request.row, tokens, request.written)
                score_prompt(sequence, output, request.written, len(tokens))
            else:
                output = backend.prefill(request.row, tokens, request.written)
            token = output.tokens()[-1] if piece.is_last else 0
            logits = output.logits()[-1] if piece.is_last and sequence.needs_logits else None
        except Exception as error:
            yield request, self._outcomes.fail(request, error)
            return
        sequence.prefill_model_s += backend.model_seconds - model_begin
        self._pace.prefilled(len(tokens), piece.middle, now() - begin)
        yield from self.end_piece(piece, token, logits)

    def _begin(self, request: Request) -> GenerationChunk | None:
        """Copy what is known of the prompt; a chunk where nothing is left to run, or the request ends here."""
        try:
            begun = self._copy_known(request)
            if begun is None and request.deadline != NEVER and self.is_late(request, self._outcomes.now()):
                begun = self._outcomes.end_early(request, "deadline")
        except Exception as error:
            begun = self._outcomes.fail(request, error)
        return begun

    def _copy_known(self, request: Request) -> GenerationChunk | None:
        """Copy into the row what is known of the prompt; the chunk of the first token where nothing is left to run."""
        sequence, ahead, prefixes = request.sequence, self._backend.steps_ahead, self._prefixes
        request.begun = True
        sequence.queue_s = self._outcomes.now() - sequence.submitted
        if ahead is not None:
            ahead.choose(request.row, sequence.choice, len(sequence.prompt) - 1)
        group = request.group
        source = None if group is None else group.source()
        if self._draft_model is not None:
            self._draft_model.begin(request, source)
        if prefixes is None:
            return None
        if group is not None and source is not None and (group.logits is not None or not sequence.needs_logits):
            prefixes.copies.fork(source.row, request.row, len(sequence.prompt))
            request.written = sequence.reused = len(sequence.prompt)
            sequence.prompt_logprobs = source.sequence.prompt_logprobs
            chunk = self._end(request, group.token, group.logits)
            group.release()
            return chunk
        # Scores of the prompt need a run over all of it.
        if prefixes.capacity and sequence.top_prompt_logprobs is None:
            request.written = sequence.reused = max(prefixes.load(request), request.written)
            self._counters.prefix_queries += len(sequence.prompt)
            self._counters.prefix_hits += sequence.reused
        return None

    def _end(self, request: Request, token: int, logits: Logits | None) -> GenerationChunk:
        """A prompt is written: its first token."""
        sequence = request.sequence
        self.requests.remove(request)
        sequence.prefilled = True
        if sequence.limit:
            return self._outcomes.accept(request, token, logits)
        sequence.ttft_s = self._outcomes.now() - sequence.submitted  # the prompt alone was to be run
        return self._outcomes.end_early(request, "length")
