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

from starling.engine.backends.backend import Backend, StepsAhead, chunk_length
from starling.engine.backends.logits import Logits, check_finite
from starling.engine.batching.prefill_pacing import LEAST, Pace
from starling.engine.batching.prefix_store import PrefixStore
from starling.engine.batching.request import NEVER, Request
from starling.engine.batching.rows import RowTable
from starling.engine.batching.serving_stats import ServingCounters
from starling.engine.batching.speculation import begin_drafts, longest_draft, write_drafts
from starling.engine.errors import RequestFailed
from starling.engine.generation.results import FinishReason, GenerationChunk
from starling.engine.generation.sequence import append_token, interrupted_chunk, score_prompt
from starling.engine.names import Speculation

LOGGER = logging.getLogger(__name__)

Handout = tuple[Request, GenerationChunk]


class Scheduler:
    """Runs requests on a backend, first come, first served. One thread uses it; `Request.cancelled` alone may be set
    by others.

    A step is: end what was cancelled or is late, admit, run the live rows and accept their tokens, and as much prefill
    as the pace allows. Whatever a request's own tokens or text fail with ends that request alone; a run that fails ends
    those that shared it.
    """

    # A decode step touches it with cold caches: its fields lie together.
    __slots__ = (
        *("_backend", "_chunk_before_step", "_counters", "_drafts", "_launched", "_pace", "_prefilling", "_rows"),
        *("_prefixes", "_speculation", "_waiting", "idle_s"),
    )

    def __init__(
        self,
        backend: Backend,
        counters: ServingCounters,
        pace: Pace,
        *,
        speculation: Speculation | None = None,
        prefixes: PrefixStore | None = None,
    ) -> None:
        """With `speculation` rows are drafted for as far as the backend can verify; `prefixes` are known from rows."""
        self._backend, self._counters, self._pace = backend, counters, pace
        self._speculation, self._prefixes = speculation, prefixes
        self._drafts = speculation is not None and backend.verified_rows > 0
        #: Seconds that count for no request: who drives the steps was busy with something else.
        self.idle_s = 0.0
        self._waiting: deque[Request] = deque()
        #: Requests that have a row and are not wholly prefilled, in the order in which they came.
        self._prefilling: deque[Request] = deque()
        self._rows = RowTable(backend.max_batch, backend.max_seq, keep=pace.prompts_first)
        #: The requests of each step that was launched ahead of the host, the oldest first.
        self._launched: deque[list[Request]] = deque()
        self._chunk_before_step = False

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        return not self._waiting and not self._rows.requests

    def add(self, request: Request) -> None:
        """Put a request, which the counters know as waiting, at the end of the queue."""
        self._waiting.append(request)

    def step(self) -> Iterable[Handout] | None:
        """One turn: each token that it brought, as it is accepted; None where nothing runs or waits.

        The next turn needs this one read to its end.
        """
        if not self._waiting and not self._prefilling:
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
        for request in [*self._rows.requests, *self._waiting]:
            try:
                chunk = self._fail(request, error)
            except Exception as further:
                LOGGER.error("request %s could not be taken out of the batch", request.id, exc_info=further)
                chunk = GenerationChunk("", None, None, "failed", request.sequence.timings())
            self._hand_out(request, chunk)

    def cancel_all(self) -> None:
        """Have the next step end all that runs or waits."""
        for request in [*self._rows.requests, *self._waiting]:
            request.cancelled = True

    def _end_unwanted(self) -> Iterator[Handout]:
        now = math.inf
        for request in [*self._rows.requests, *self._waiting]:
            if request.cancelled:
                yield request, self._end_early(request, "cancelled")
            elif request.deadline != NEVER:
                now = self._now() if now == math.inf else now
                if now >= request.deadline:
                    yield request, self._end_early(request, "deadline")

    def _admit(self) -> None:
        while self._waiting and self._rows.has_free:
            request = self._waiting[0]
            request.written = request.sequence.reused
            self._rows.take(request)
            self._waiting.popleft()
            self._prefilling.append(request)
            self._counters.admit()

    # Three ways to run the live rows.

    def _decode(self) -> Iterable[Handout]:
        """The live rows' next tokens: launched ahead where the device chooses them, verified where drafts are known."""
        ahead, rows, logits = self._backend.steps_ahead, self._rows, None
        requests = rows.live_requests
        if ahead is not None and (self._launched or not (self._drafts or rows.needs_logits)):
            self._launch(ahead)
        if not self._launched and self._speculation is not None and (width := self._draft(requests)) > 1:
            return self._verify(requests, width, self._chunk_before_step)
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
        if not self._pace.prompts_first:
            self._pace.decoded(len(requests), perf_counter() - begin, after_chunk=self._chunk_before_step)
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
        """Write the requests' drafts; how many tokens of each row the step must verify, 1 where nothing is known."""
        rows = self._verified_rows(requests)
        if not rows:
            return 1
        room = self._backend.max_seq - max(self._rows.positions[rows.start : rows.stop])
        return 1 + write_drafts(requests, len(rows), longest_draft(len(rows), room))

    def _verified_rows(self, requests: Sequence[Request]) -> range:
        """The rows that are verified together: all up to the last live one, or the only live one; none where the
        backend cannot.
        """
        last = requests[-1].row
        if last < self._backend.verified_rows:
            return range(last + 1)
        return range(last, last + 1) if len(requests) == 1 and self._backend.verified_rows else range(0)

    def _verify(self, requests: list[Request], width: int, after_chunk: bool) -> Iterator[Handout]:
        """One run over `width` tokens of each row: the newest one, its draft, and what is overwritten later."""
        begin, rows = self._now(), self._verified_rows(requests)
        tokens = [[self._rows.tokens[row]] * width for row in rows]
        for request in requests:
            tokens[request.row - rows.start][1 : 1 + len(request.draft)] = request.draft
        try:
            for grammar in self._rows.grammars:
                grammar.begin_mask()
            output = self._backend.verify(rows.start, tokens, self._rows.positions[rows.start : rows.stop])
            chosen = output.tokens()
            logits = output.logits() if self._rows.needs_logits else None
        except Exception as error:
            yield from self._fail_each(requests, error)
            return
        for request in requests:
            if request.row >= 0:
                first = (request.row - rows.start) * width
                theirs = None if logits is None else logits[first : first + width]
                yield from self._accept_draft(request, chosen[first : first + width], theirs)
        self._pace.decoded(len(requests), self._now() - begin, after_chunk=after_chunk)

    def _accept_draft(self, request: Request, chosen: list[int], logits: Logits | None) -> Iterator[Handout]:
        """Tokens of one run, as far as the draft was right."""
        sequence, draft, taken = request.sequence, request.draft, 0
        sequence.drafted += len(draft)
        for token, drafted in zip(chosen, [*draft, None], strict=False):
            chunk = self._accept(request, token, None if logits is None else logits[taken])
            is_right = drafted is not None and chunk.token == drafted
            sequence.accepted += is_right
            taken += 1
            yield request, chunk
            if not is_right or request.row < 0:
                break
        if draft and request.lookup is not None and not request.forced:
            request.lookup.judge(len(draft), taken - 1)

    def _prefill(self) -> Iterator[Handout]:
        """Chunks of the oldest prompts until the time for them is used up, at least one."""
        begin, budget, least = self._now(), self._pace.budget(len(self._rows.live)), LEAST
        while self._prefilling:
            most = max(self._pace.chunk(budget - (self._now() - begin)), least)
            if most == 0:
                return
            yield from self._prefill_chunk(self._prefilling[0], most)
            least = 0
            if budget == math.inf:  # the request may decode now, or newer ones be cancelled: look again
                return

    def _prefill_chunk(self, request: Request, most: int) -> Iterator[Handout]:
        sequence, backend = request.sequence, self._backend
        if not request.begun:
            try:
                begun = self._begin_prefill(request)
            except Exception as error:
                begun = self._fail(request, error)
            if begun is not None:
                yield request, begun
                return
        begin, model_begin = self._now(), backend.model_seconds
        left = sequence.prompt[request.written :]
        is_scored = sequence.top_prompt_logprobs is not None
        most = min(most, backend.most_scored) if is_scored else most
        tokens = np.array(left[: chunk_length(len(left), most)], dtype=np.int64)
        is_last = len(tokens) == len(left)
        try:
            run = backend.score if is_scored else backend.prefill
            output = run(request.row, tokens, request.written)
            if is_scored:
                score_prompt(sequence, output, request.written, len(tokens))
            token = output.tokens()[-1] if is_last else 0
            logits = output.logits()[-1] if is_last and sequence.needs_logits else None
        except Exception as error:
            yield request, self._fail(request, error)
            return
        sequence.prefill_model_s += backend.model_seconds - model_begin
        request.written += len(tokens)
        self._counters.prompt_tokens += len(tokens)
        self._pace.prefilled(len(tokens), self._now() - begin)
        if is_last:
            if request.group is not None:
                request.group.keep(token, logits)
            yield request, self._end_prefill(request, token, logits)
        else:
            self._rows.hold(request)
        if self._prefixes is not None and request.row >= 0:  # else it was kept when the request ended
            self._prefixes.save(sequence.prompt[: request.written], request)

    def _begin_prefill(self, request: Request) -> GenerationChunk | None:
        """Copy into the row what is known of the prompt; the chunk of the first token where nothing is left to run."""
        sequence, ahead, prefixes = request.sequence, self._backend.steps_ahead, self._prefixes
        request.begun = True
        sequence.queue_s = self._now() - sequence.submitted
        if ahead is not None:
            ahead.choose(request.row, sequence.choice, len(sequence.prompt) - 1)
        if prefixes is None:
            return None
        group = request.group
        source = None if group is None else group.source()
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
        """The oldest prompt is written: its first token."""
        sequence = request.sequence
        self._prefilling.popleft()
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
            chunk = append_token(sequence, token, logits, model_s=self._backend.model_seconds, idle_s=self.idle_s)
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
            if self._speculation is not None:
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
            self._rows.release(request)
        elif request in self._waiting:
            self._waiting.remove(request)
        self._counters.leave(reason, running=running)
