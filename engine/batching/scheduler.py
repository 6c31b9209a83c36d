"""The step: requests join and leave the rows of one KV cache between runs of the model.

One object for a script's single prompt and for a server's hundred requests: `generation` drives it on the caller's
thread, `serving_loop` on one of its own.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from time import perf_counter

from starling.engine.backends.backend import (
    MOST_VERIFIED,
    MOST_VERIFIED_TOGETHER,
    Backend,
    StepsAhead,
)
from starling.engine.backends.logits import Logits, check_finite
from starling.engine.batching.draft_model import DraftModel
from starling.engine.batching.mixed_step import plan_mixed_step
from starling.engine.batching.prefill_pacing import Pace
from starling.engine.batching.prefills import Prefills
from starling.engine.batching.prefix_store import PrefixStore
from starling.engine.batching.request import NEVER, Handout, Request
from starling.engine.batching.rows import RowTable
from starling.engine.batching.serving_stats import ServingCounters
from starling.engine.batching.speculation import begin_drafts, model_drafts, write_drafts
from starling.engine.batching.waiting_requests import WaitingRequests
from starling.engine.errors import RequestFailed
from starling.engine.generation.results import FinishReason, GenerationChunk
from starling.engine.generation.sequence import append_token, interrupted_chunk
from starling.engine.names import Speculation

LOGGER = logging.getLogger(__name__)


class Scheduler:
    """Runs requests on a backend: by priority, fair between owners, first come, first served. One thread uses it;
    `Request.cancelled` alone may be set by others.

    A step is: end what was cancelled or is late, admit, run the live rows and accept their tokens, and as much prefill
    as the pace allows, in the same run of the model where the backend mixes them. Whatever a request's own tokens or
    text fail with ends that request alone; a run that fails ends those that shared it.
    """

    # A decode step touches it with cold caches: its fields lie together.
    __slots__ = (
        *("_backend", "_chunk_before_step", "_costs", "_counters", "_draft_model", "_drafts", "_launched", "_mixes"),
        *("_prefilling", "_prefills", "_prefixes", "_prompts_first", "_rows", "_waiting", "idle_s"),
    )

    def __init__(
        self,
        backend: Backend,
        counters: ServingCounters,
        pace: Pace,
        *,
        speculation: Speculation | None = None,
        draft: DraftModel | None = None,
        prefixes: PrefixStore | None = None,
    ) -> None:
        """With `speculation` rows are drafted for as far as the backend can verify, by `draft` where that is its name;
        `prefixes` are known from rows.
        """
        self._backend, self._counters, self._prefixes = backend, counters, prefixes
        self._costs, self._prompts_first = pace.costs, pace.prompts_first
        self._drafts = speculation is not None and backend.verified_rows > 0
        self._draft_model = draft if self._drafts and speculation == "draft-model" else None
        self._mixes = backend.most_mixed > 0
        #: Seconds that count for no request: who drives the steps was busy with something else.
        self.idle_s = 0.0
        self._waiting = WaitingRequests()
        self._rows = RowTable(backend.max_batch, backend.max_seq, keep=pace.prompts_first)
        self._prefills = Prefills(self, backend, self._rows, counters, pace, prefixes, self._draft_model)
        self._prefilling = self._prefills.requests
        #: The requests of each step that was launched ahead of the host, the oldest first.
        self._launched: deque[list[Request]] = deque()
        self._chunk_before_step = False

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        return not self._waiting.requests and not self._rows.requests

    def add(self, request: Request) -> None:
        """Put a request, which the counters know as waiting, into the queue."""
        self._waiting.add(request, self._rows.requests)

    def step(self) -> Iterable[Handout] | None:
        """One turn: each token that it brought, as it is accepted; None where nothing runs or waits.

        The next turn needs this one read to its end.
        """
        if not self._waiting.requests and not self._prefilling:
            for request in self._rows.requests:
                if request.cancelled or request.deadline != NEVER:
                    break
            else:  # nothing but a decode step: the usual turn, kept short
                handouts = self._decode() if self._rows.live else None
                self._chunk_before_step = False
                return handouts
        return self._whole_step()

    def _whole_step(self) -> Iterator[Handout]:
        yield from self._end_unwanted()
        self._admit()
        prefills = self._prefills
        if self._rows.live and not (prefills.requests and self._prompts_first):
            if self._mixes and not self._prompts_first:
                yield from prefills.begin_first()
                if prefills.requests and not prefills.requests[0].is_scored:
                    yield from self._step_beside(prefills.requests[0])
                    return
            yield from self._decode()
        self._chunk_before_step = bool(prefills.requests)
        if prefills.requests:
            while self._launched:  # a prefill would drop what was launched; none is launched beside it
                yield from self._decode()
            yield from prefills.run_alone()

    def serve_step(self) -> None:
        """One turn whose tokens go into their requests' queues."""
        for request, chunk in self.step() or ():
            self._hand_out(request, chunk)

    def _hand_out(self, request: Request, chunk: GenerationChunk) -> None:
        """What a reader's callback raises, SystemExit too, ends its request."""
        try:
            request.queue.put(chunk)
        except BaseException as error:
            if request.sequence.finish_reason is not None:
                LOGGER.warning("request %s: its reader failed with the last chunk: %r", request.id, error)
                return
            failure = error if isinstance(error, Exception) else RuntimeError(repr(error))
            self._hand_out(request, self.fail(request, failure))

    def _fail_each(self, requests: list[Request], error: Exception) -> list[Handout]:
        return [(request, self.fail(request, error)) for request in requests]

    def fail(self, request: Request, error: Exception) -> GenerationChunk:
        """End one request, whose `error` this becomes; its last chunk."""
        sequence = request.sequence
        request.error = RequestFailed(f"request {request.id} failed after {len(sequence.tokens)} token(s): {error}")
        request.error.__cause__ = error
        sequence.finish_reason = "failed"
        self._leave(request, "failed")
        return GenerationChunk("", None, None, "failed", sequence.timings())

    def fail_all(self, error: Exception) -> None:
        """End all that runs or waits. Whatever state a failure left this object in, nobody is left waiting."""
        self._launched.clear()
        for request in [*self._rows.requests, *self._waiting.requests]:
            try:
                chunk = self.fail(request, error)
            except Exception as further:
                LOGGER.error("request %s could not be taken out of the batch", request.id, exc_info=further)
                chunk = GenerationChunk("", None, None, "failed", request.sequence.timings())
            self._hand_out(request, chunk)

    def cancel_all(self) -> None:
        """Have the next step end all that runs or waits."""
        for request in [*self._rows.requests, *self._waiting.requests]:
            request.cancelled = True

    def _end_unwanted(self) -> Iterator[Handout]:
        now = math.inf
        for request in [*self._rows.requests, *self._waiting.requests]:
            if request.cancelled:
                yield request, self.end_early(request, "cancelled")
            elif request.deadline != NEVER:
                now = self.now() if now == math.inf else now
                is_new = request.row < 0 and not request.seen
                if now >= request.deadline or (is_new and self._prefills.is_late(request, now)):
                    yield request, self.end_early(request, "deadline")
                request.seen = True

    def _admit(self) -> None:
        while self._waiting.requests and self._rows.has_free:
            request = self._waiting.next(self._rows.requests)
            request.written = request.sequence.reused
            self._rows.take(request)
            self._waiting.remove(request)
            self._prefills.add(request)
            self._counters.admit()

    # Three ways to run the live rows.

    def _decode(self) -> Iterable[Handout]:
        """The live rows' next tokens: launched ahead where the device chooses them, verified where drafts are known."""
        ahead, rows, logits = self._backend.steps_ahead, self._rows, None
        requests = rows.live_requests
        if ahead is not None and (self._launched or not (self._drafts or rows.needs_logits)):
            self._launch(ahead)
        if self._drafts and not self._launched and self._draft(requests):
            return self._mix(requests) if self._mixes else self._verify(requests[0])
        begin = perf_counter()
        try:
            if ahead is not None and self._launched:
                requests = self._launched.popleft()
                chosen = ahead.tokens()
            else:
                for grammar in rows.grammars:
                    grammar.begin_mask()
                output = self._backend.decode(rows.tokens[: rows.covered], rows.positions[: rows.covered])
                chosen = output.tokens()
                logits = output.logits() if rows.needs_logits else None
        except Exception as error:
            self._launched.clear()
            return self._fail_each(rows.live_requests, error)
        accepted: list[Handout] = []
        for request in requests:  # a call or a comprehension would take 4 µs more, with cold caches
            row = request.row
            if row >= 0:  # else it has ended since the step was launched
                accepted.append((request, self.accept(request, chosen[row], None if logits is None else logits[row])))
        if self._costs is not None:
            self._costs.decoded(len(requests), perf_counter() - begin, after_chunk=self._chunk_before_step)
        return accepted

    def _launch(self, ahead: StepsAhead) -> None:
        """Launch as many steps ahead as can be, none where a prompt waits for its prefill."""
        while not self._prefilling and (rows := self._rows_to_launch()) and ahead.can_launch(rows):
            ahead.launch(rows)
            self._launched.append(self._rows.live_requests)

    def _rows_to_launch(self) -> int:
        """How many rows the next launch must cover, with those launched before it under way; 0: nothing to launch."""
        for request in reversed(self._rows.live_requests):
            if len(request.sequence.tokens) + len(self._launched) < request.sequence.limit:
                return request.row + 1
        return 0

    def _draft(self, requests: Sequence[Request]) -> int:
        """Write the requests' drafts; how many tokens they have together. None where the backend cannot verify them."""
        costs, rows = self._costs, len(requests)
        if costs is None or not (self._mixes or rows == 1) or costs.wants_quiet(rows):
            for request in requests:
                request.draft = []
            return 0
        most = MOST_VERIFIED_TOGETHER - rows if self._mixes else MOST_VERIFIED - 1
        if self._draft_model is not None:
            return model_drafts(requests, costs, most, self._draft_model)
        return write_drafts(requests, costs, most)

    def _mix(self, requests: list[Request], prompt: Request | None = None) -> Iterator[Handout]:
        """One run over the live rows' newest tokens with their drafts, and as much of a prompt as fits beside them."""
        begin, model_begin, backend, costs = self.now(), self._backend.model_seconds, self._backend, self._costs
        assert costs is not None
        drafted = sum(len(request.draft) for request in requests)
        piece = None if prompt is None else self._prefills.piece_beside(prompt, len(requests), drafted)
        step = plan_mixed_step(self._rows, requests, piece)
        try:
            for grammar in self._rows.grammars:
                grammar.begin_mask()
            output = backend.mix(step.parts, step.kept)
            chosen = output.tokens()
            needs_logits = self._rows.needs_logits or (prompt is not None and prompt.sequence.needs_logits)
            logits = output.logits() if needs_logits else None
        except Exception as error:
            yield from self._fail_each([*requests, *(() if prompt is None else (prompt,))], error)
            return
        model_s, middle = backend.model_seconds - model_begin, 0.0 if piece is None else piece.middle
        for request in requests:
            if request.row >= 0:
                first = step.first_rows[request.row]
                last = first + 1 + len(request.draft)
                yield from self._accept_draft(
                    request, chosen[first:last], None if logits is None else logits[first:last]
                )
        if piece is not None:
            piece.request.sequence.prefill_model_s += (
                model_s * piece.tokens / sum(len(part.tokens) for part in step.parts)
            )
            at = step.first_rows[piece.request.row]
            token, theirs = (chosen[at], None if logits is None else logits[at]) if piece.is_last else (0, None)
            yield from self._prefills.end_piece(piece, token, theirs)
        costs.mixed(
            len(requests),
            self.now() - begin,
            prompt=0 if piece is None else piece.tokens,
            position=middle,
            drafted=drafted,
        )

    def _step_beside(self, prompt: Request) -> Iterable[Handout]:
        """The live rows' next tokens with as much of a prompt as the pace allows; none where it wants a quiet step."""
        requests, costs = self._rows.live_requests, self._costs
        if not requests or costs is None or costs.wants_quiet(len(requests)):
            handouts: Iterable[Handout] = self._decode() if requests else ()
        else:
            if self._drafts:
                self._draft(requests)
            handouts = self._mix(requests, prompt)
        yield from handouts
        self._chunk_before_step = False

    def _verify(self, request: Request) -> Iterator[Handout]:
        """One run over the newest token and the draft of the only live row."""
        begin, rows, costs = self.now(), self._rows, self._costs
        assert costs is not None
        tokens = [rows.tokens[request.row], *request.draft]
        try:
            for grammar in rows.grammars:
                grammar.begin_mask()
            output = self._backend.verify(request.row, tokens, rows.positions[request.row])
            chosen = output.tokens()
            logits = output.logits() if rows.needs_logits else None
        except Exception as error:
            yield from self._fail_each([request], error)
            return
        yield from self._accept_draft(request, chosen, logits)
        costs.mixed(1, self.now() - begin, prompt=0, position=0.0, drafted=len(tokens) - 1)

    def _accept_draft(self, request: Request, chosen: list[int], logits: Logits | None) -> Iterator[Handout]:
        """Tokens of one run, as far as the draft was right."""
        sequence, draft, before = request.sequence, request.draft, request.sequence.accepted
        sequence.drafted += len(draft)
        if draft:
            self._counters.drafts += 1
            self._counters.drafted_tokens += len(draft)
        for number, (token, drafted) in enumerate(zip(chosen, [*draft, None], strict=False)):
            chunk = self.accept(request, token, None if logits is None else logits[number])
            is_right = drafted is not None and chunk.token == drafted
            sequence.accepted += is_right
            self._counters.accepted_tokens += is_right
            ends = request.row < 0
            if self._draft_model is not None and draft and not ends and not is_right:
                self._draft_model.judge(request, len(draft), sequence.accepted - before)
            yield request, chunk
            if not is_right or ends:
                break

    def accept(self, request: Request, token: int, logits: Logits | None) -> GenerationChunk:
        """A request's newest token: into its text, and into the next step unless it ends here."""
        sequence = request.sequence
        try:
            if token < 0:
                self._backend.clear(request.row)
                check_finite(math.nan)
            model_s = self._backend.model_seconds
            if self._draft_model is not None:
                model_s += self._draft_model.backend.model_seconds
            chunk = append_token(sequence, token, logits, model_s=model_s, idle_s=self.idle_s)
            token = sequence.tokens[-1]
            if request.lookup is not None:
                request.lookup.push(token)
        except Exception as error:
            return self.fail(request, error)
        self._counters.generated_tokens += 1
        if chunk.finish_reason is not None:
            self._leave(request, chunk.finish_reason)
        elif len(sequence.tokens) > 1:
            rows, row = self._rows, request.row
            rows.tokens[row] = token
            rows.positions[row] += 1
        else:
            self._rows.go_live(request, token)
            if self._drafts and self._draft_model is None:
                begin_drafts(request)
        return chunk

    def now(self) -> float:
        return perf_counter() - self.idle_s

    def end_early(self, request: Request, reason: FinishReason) -> GenerationChunk:
        try:
            chunk = interrupted_chunk(request.sequence, reason)
        except Exception as error:
            return self.fail(request, error)
        self._leave(request, chunk.finish_reason or reason)
        return chunk

    def _leave(self, request: Request, reason: FinishReason) -> None:
        """Before the last chunk goes out: its reader finds the row free and the request counted."""
        running = request.row >= 0
        if request in self._prefilling:
            self._prefilling.remove(request)
        if running:
            if self._prefixes is not None and request.sequence.prefilled and reason != "failed":
                self._prefixes.save(request.sequence.cached_ids(), request)
            if self._draft_model is not None and request.sequence.prefilled and reason != "failed":
                self._draft_model.end(request)
            self._rows.release(request)
            self._waiting.ended(request, is_last=self.idle)
        elif request in self._waiting.requests:
            self._waiting.remove(request)
        self._counters.leave(reason, running=running)
