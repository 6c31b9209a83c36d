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

import numpy as np

from starling.engine.backends.backend import (
    MOST_VERIFIED,
    MOST_VERIFIED_TOGETHER,
    Backend,
    StepOutput,
    StepsAhead,
    chunk_length,
)
from starling.engine.backends.logits import Logits, check_finite
from starling.engine.batching.draft_model import DraftModel
from starling.engine.batching.mixed_step import Piece, plan_mixed_step
from starling.engine.batching.prefill_pacing import LEAST, Pace
from starling.engine.batching.prefix_store import PrefixStore
from starling.engine.batching.request import NEVER, Request
from starling.engine.batching.rows import RowTable
from starling.engine.batching.serving_stats import ServingCounters
from starling.engine.batching.speculation import begin_drafts, model_drafts, write_drafts
from starling.engine.batching.step_costs import StepCosts
from starling.engine.batching.waiting_requests import WaitingRequests
from starling.engine.errors import BackendError, RequestFailed
from starling.engine.generation.results import FinishReason, GenerationChunk
from starling.engine.generation.sequence import append_token, interrupted_chunk, score_prompt
from starling.engine.names import Speculation

LOGGER = logging.getLogger(__name__)

Handout = tuple[Request, GenerationChunk]


class Scheduler:
    """Runs requests on a backend: by priority, fair between owners, first come, first served. One thread uses it;
    `Request.cancelled` alone may be set by others.

    A step is: end what was cancelled or is late, admit, run the live rows and accept their tokens, and as much prefill
    as the pace allows, in the same run of the model where the backend mixes them. Whatever a request's own tokens or
    text fail with ends that request alone; a run that fails ends those that shared it.
    """

    # A decode step touches it with cold caches: its fields lie together.
    __slots__ = (
        *(
            "_backend",
            "_chunk_before_step",
            "_costs",
            "_counters",
            "_draft_model",
            "_drafts",
            "_launched",
            "_mixes",
            "_pace",
        ),
        *("_drafting_s", "_prefilling", "_prefixes", "_rows", "_waiting", "idle_s"),
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
        self._backend, self._counters, self._pace = backend, counters, pace
        self._prefixes, self._costs = prefixes, pace.costs
        self._drafts = speculation is not None and backend.verified_rows > 0
        self._draft_model = draft if self._drafts and speculation == "draft-model" else None
        self._mixes = backend.most_mixed > 0
        #: Seconds of the draft model's runs.
        self._drafting_s = 0.0
        #: Seconds that count for no request: who drives the steps was busy with something else.
        self.idle_s = 0.0
        self._waiting = WaitingRequests()
        #: Requests that have a row and are not wholly prefilled, those of a lower `priority` first.
        self._prefilling: deque[Request] = deque()
        self._rows = RowTable(backend.max_batch, backend.max_seq, keep=pace.prompts_first)
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
        if self._rows.live and not (self._prefilling and self._pace.prompts_first):
            if self._mixes and not self._pace.prompts_first:
                yield from self._begin_prefills()
            if self._mixes and self._prefilling and not self._prefilling[0].is_scored:
                yield from self._step_beside(self._prefilling[0])
                return
            yield from self._decode()
        self._chunk_before_step = bool(self._prefilling)
        if self._prefilling:
            while self._launched:  # a prefill would drop what was launched; none is launched beside it
                yield from self._decode()
            yield from self._prefill()

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
            self._hand_out(request, self._fail(request, failure))

    def _fail_each(self, requests: list[Request], error: Exception) -> list[Handout]:
        return [(request, self._fail(request, error)) for request in requests]

    def _fail(self, request: Request, error: Exception) -> GenerationChunk:
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
                chunk = self._fail(request, error)
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
                yield request, self._end_early(request, "cancelled")
            elif request.deadline != NEVER:
                now = self._now() if now == math.inf else now
                if now >= request.deadline or (request.row < 0 and not request.seen and self._is_late(request, now)):
                    yield request, self._end_early(request, "deadline")
                request.seen = True

    def _is_late(self, request: Request, now: float) -> bool:
        """Whether the deadline passes before its prompt can be prefilled, even if nothing else ran."""
        known = request.written
        if not request.begun and self._prefixes is not None:
            known = self._prefixes.known(request)
        return now + self._pace.least_s(len(request.sequence.prompt) - known) >= request.deadline

    def _admit(self) -> None:
        while self._waiting.requests and self._rows.has_free:
            request = self._waiting.next(self._rows.requests)
            request.written = request.sequence.reused
            self._rows.take(request)
            self._waiting.remove(request)
            place = sum(one.priority <= request.priority for one in self._prefilling)
            self._prefilling.insert(place, request)
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
                accepted.append((request, self._accept(request, chosen[row], None if logits is None else logits[row])))
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
            return self._model_drafts(self._draft_model, requests, costs, most)
        return write_drafts(requests, costs, most)

    def _model_drafts(self, draft: DraftModel, requests: Sequence[Request], costs: StepCosts, most: int) -> int:
        """Drafts by the draft model; none where it fails, which harms no answer."""
        before = draft.backend.model_seconds
        try:
            return model_drafts(requests, costs, most, draft)
        except BackendError as error:
            LOGGER.warning("the draft model has failed, and a step goes without it: %s", error)
            for request in requests:
                request.draft = []
            return 0
        finally:
            self._drafting_s += draft.backend.model_seconds - before

    def _mix(self, requests: list[Request], prompt: Request | None = None) -> Iterator[Handout]:
        """One run over the live rows' newest tokens with their drafts, and as much of a prompt as fits beside them."""
        begin, model_begin, backend, costs = self._now(), self._backend.model_seconds, self._backend, self._costs
        assert costs is not None
        drafted = sum(len(request.draft) for request in requests)
        piece = None if prompt is None else self._piece(prompt, len(requests), drafted)
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
            yield from self._end_piece(piece, token, theirs)
        costs.mixed(
            len(requests),
            self._now() - begin,
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

    def _piece(self, prompt: Request, rows: int, drafted: int) -> Piece:
        """As much of a prompt as the pace has time for beside the live rows."""
        left = len(prompt.sequence.prompt) - prompt.written
        most = min(self._pace.beside(rows, drafted, prompt.written), self._backend.most_mixed - rows - drafted)
        return Piece(prompt, chunk_length(left, max(most, 1)))

    def _verify(self, request: Request) -> Iterator[Handout]:
        """One run over the newest token and the draft of the only live row."""
        begin, rows, costs = self._now(), self._rows, self._costs
        assert costs is not None
        tokens = [rows.tokens[request.row], *request.draft]
        try:
            for grammar in rows.grammars:
                grammar.begin_mask()
            output = self._backend.verify(request.row, [tokens], [rows.positions[request.row]])
            chosen = output.tokens()
            logits = output.logits() if rows.needs_logits else None
        except Exception as error:
            yield from self._fail_each([request], error)
            return
        yield from self._accept_draft(request, chosen, logits)
        costs.mixed(1, self._now() - begin, prompt=0, position=0.0, drafted=len(tokens) - 1)

    def _accept_draft(self, request: Request, chosen: list[int], logits: Logits | None) -> Iterator[Handout]:
        """Tokens of one run, as far as the draft was right."""
        sequence, draft, before = request.sequence, request.draft, request.sequence.accepted
        sequence.drafted += len(draft)
        if draft:
            self._counters.drafts += 1
            self._counters.drafted_tokens += len(draft)
        for number, (token, drafted) in enumerate(zip(chosen, [*draft, None], strict=False)):
            chunk = self._accept(request, token, None if logits is None else logits[number])
            is_right = drafted is not None and chunk.token == drafted
            sequence.accepted += is_right
            self._counters.accepted_tokens += is_right
            ends = request.row < 0
            if self._draft_model is not None and draft and not ends and not is_right:
                self._draft_model.judge(request, len(draft), sequence.accepted - before)
            yield request, chunk
            if not is_right or ends:
                break

    def _prefill(self) -> Iterator[Handout]:
        """Chunks of the oldest prompts until the time for them is used up, at least one."""
        begin, budget, least = self._now(), self._pace.budget(len(self._rows.live)), LEAST
        while self._prefilling:
            oldest = self._prefilling[0]
            most = max(self._pace.chunk(budget - (self._now() - begin), oldest.written), least)
            if most == 0:
                return
            yield from self._prefill_chunk(oldest, most)
            least = 0
            if budget == math.inf:  # the request may decode now, or newer ones be cancelled: look again
                return

    def _prefill_chunk(self, request: Request, most: int) -> Iterator[Handout]:
        """One run over a piece of a prompt alone."""
        sequence, backend = request.sequence, self._backend
        if not request.begun and (begun := self._begin_prefill(request)) is not None:
            yield request, begun
            return
        begin, model_begin = self._now(), backend.model_seconds
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
            yield request, self._fail(request, error)
            return
        sequence.prefill_model_s += backend.model_seconds - model_begin
        self._pace.prefilled(len(tokens), piece.middle, self._now() - begin)
        yield from self._end_piece(piece, token, logits)

    def _end_piece(self, piece: Piece, token: int, logits: Logits | None) -> Iterator[Handout]:
        """A piece of a prompt is written; after the last one the backend's choice is `token`, its logits [vocab]."""
        request, sequence, is_last = piece.request, piece.request.sequence, piece.is_last
        request.written += piece.tokens
        self._counters.prompt_tokens += piece.tokens
        if self._draft_model is not None:
            self._follow(self._draft_model, request)
        if is_last:
            if request.group is not None:
                request.group.keep(token, logits)
            yield request, self._end_prefill(request, token, logits)
        else:
            self._rows.hold(request)
        if self._prefixes is not None and request.row >= 0:  # else it was kept when the request ended
            self._prefixes.save(sequence.prompt[: request.written], request)

    def _follow(self, draft: DraftModel, request: Request) -> None:
        before = draft.backend.model_seconds
        try:
            draft.follow(request, request.written)
        except BackendError as error:
            LOGGER.warning("the draft model has failed with a prompt, whose request goes on: %s", error)
            draft.forget()
        finally:
            self._drafting_s += draft.backend.model_seconds - before

    def _begin_prefills(self) -> Iterator[Handout]:
        """Begin the oldest prompt, and those after ones of which nothing was left to run."""
        while self._prefilling and not (request := self._prefilling[0]).begun:
            begun = self._begin_prefill(request)
            if begun is not None:
                yield request, begun

    def _begin_prefill(self, request: Request) -> GenerationChunk | None:
        """Copy what is known of the prompt; a chunk where nothing is left to run, or the request ends here."""
        try:
            begun = self._copy_known(request)
            if begun is None and request.deadline != NEVER and self._is_late(request, self._now()):
                begun = self._end_early(request, "deadline")
        except Exception as error:
            begun = self._fail(request, error)
        return begun

    def _copy_known(self, request: Request) -> GenerationChunk | None:
        """Copy into the row what is known of the prompt; the chunk of the first token where nothing is left to run."""
        sequence, ahead, prefixes = request.sequence, self._backend.steps_ahead, self._prefixes
        request.begun = True
        sequence.queue_s = self._now() - sequence.submitted
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
            chunk = self._end_prefill(request, group.token, group.logits)
            group.release()
            return chunk
        # Scores of the prompt need a run over all of it.
        if prefixes.capacity and sequence.top_prompt_logprobs is None:
            request.written = sequence.reused = max(prefixes.load(request), request.written)
            self._counters.prefix_queries += len(sequence.prompt)
            self._counters.prefix_hits += sequence.reused
        return None

    def _end_prefill(self, request: Request, token: int, logits: Logits | None) -> GenerationChunk:
        """A prompt is written: its first token."""
        sequence = request.sequence
        self._prefilling.remove(request)
        sequence.prefilled = True
        if sequence.limit:
            return self._accept(request, token, logits)
        sequence.ttft_s = self._now() - sequence.submitted  # the prompt alone was to be run
        return self._end_early(request, "length")

    def _accept(self, request: Request, token: int, logits: Logits | None) -> GenerationChunk:
        """A request's newest token: into its text, and into the next step unless it ends here."""
        sequence = request.sequence
        try:
            if token < 0:
                self._backend.clear(request.row)
                check_finite(math.nan)
            chunk = append_token(
                sequence, token, logits, model_s=self._backend.model_seconds + self._drafting_s, idle_s=self.idle_s
            )
            token = sequence.tokens[-1]
            if request.lookup is not None:
                request.lookup.push(token)
        except Exception as error:
            return self._fail(request, error)
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

    def _now(self) -> float:
        return perf_counter() - self.idle_s

    def _end_early(self, request: Request, reason: FinishReason) -> GenerationChunk:
        try:
            chunk = interrupted_chunk(request.sequence, reason)
        except Exception as error:
            return self._fail(request, error)
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
