"""Continuous batching: requests join and leave the rows of one KV cache between the steps of the model."""

from __future__ import annotations

import logging
import math
from collections import deque
from time import perf_counter

import numpy as np

from starling.engine.backend import Backend, chunk_length
from starling.engine.errors import RequestFailed
from starling.engine.logits import Logits
from starling.engine.prefill_pace import LEAST, PrefillPace
from starling.engine.request import Request
from starling.engine.results import FinishReason, GenerationChunk
from starling.engine.sampling import check_finite
from starling.engine.sequence import accept, interrupted_chunk, next_chunk
from starling.engine.serving_stats import ServingCounters
from starling.engine.slots import SlotTable

LOGGER = logging.getLogger(__name__)


class Scheduler:
    """Runs requests on a backend, first come, first served. One thread uses it; `Request.cancelled` alone may be set
    by others.

    A step of the scheduler is: end what was cancelled or is late, admit, one decode step of all live rows, and as much
    prefill as the pace allows. Whatever a request's own tokens, text or reader fail with ends that request alone; a
    decode step that fails ends those that shared it.
    """

    def __init__(self, backend: Backend, counters: ServingCounters, pace: PrefillPace) -> None:
        self._backend, self._counters, self._pace = backend, counters, pace
        self._waiting: deque[Request] = deque()
        #: Requests that have a row and are not wholly prefilled, in the order in which they came.
        self._prefilling: deque[Request] = deque()
        self._slots = SlotTable(backend.max_batch)
        self._chunk_before_step = False

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        return not self._waiting and not self._slots.requests

    def add(self, request: Request) -> None:
        """Put a request, which the counters know as waiting, at the end of the queue."""
        self._waiting.append(request)

    def step(self) -> None:
        """One turn; every request gets the tokens that the turn brought."""
        self._end_unwanted()
        self._admit()
        if self._slots.live:
            self._decode()
        self._prefill()

    def fail_all(self, error: Exception) -> None:
        """End all that runs or waits."""
        for request in [*self._slots.requests, *self._waiting]:
            self._fail(request, error)

    def cancel_all(self) -> None:
        """Have the next step end all that runs or waits."""
        for request in [*self._slots.requests, *self._waiting]:
            request.cancelled = True

    def _end_unwanted(self) -> None:
        now = perf_counter()
        for request in [*self._slots.requests, *self._waiting]:
            if request.cancelled:
                self._end_early(request, "cancelled")
            elif now >= request.deadline:
                self._end_early(request, "deadline")

    def _admit(self) -> None:
        while self._waiting and self._slots.has_free:
            request = self._waiting.popleft()
            self._slots.take(request)
            self._prefilling.append(request)
            self._counters.admit()

    def _decode(self) -> None:
        """One step of the live rows. A backend's pipeline (steps launched ahead) would come in here."""
        requests, begin = self._slots.live_requests, perf_counter()
        try:
            output = self._backend.decode(*self._slots.step())
            chosen = output.choices()
            logits = output.logits() if any(request.sequence.needs_logits for request in requests) else None
        except Exception as error:
            for request in requests:
                self._fail(request, error)
            return
        for request in requests:
            row = request.slot
            self._take_token(request, chosen[row], None if logits is None else logits[row])
        self._pace.decoded(len(requests), perf_counter() - begin, behind_chunk=self._chunk_before_step)

    def _prefill(self) -> None:
        """Chunks of the oldest prompts until the time for them is used up, at least one."""
        begin, budget, least = perf_counter(), self._pace.budget(len(self._slots.live)), LEAST
        self._chunk_before_step = bool(self._prefilling)
        while self._prefilling:
            most = max(self._pace.chunk(budget - (perf_counter() - begin)), least)
            if most == 0:
                return
            self._prefill_chunk(self._prefilling[0], most)
            least = 0
            if budget == math.inf:  # the request may decode now, or newer ones be cancelled: look again
                return

    def _prefill_chunk(self, request: Request, most: int) -> None:
        sequence, backend = request.sequence, self._backend
        begin, model_begin = perf_counter(), backend.model_seconds
        left = sequence.prompt[request.written :]
        tokens = np.array(left[: chunk_length(len(left), most)], dtype=np.int64)
        is_last = len(tokens) == len(left)
        try:
            if request.written == 0:
                sequence.queue_s = begin - request.submitted
                if backend.pipeline is not None:
                    backend.pipeline.choose(request.slot, sequence.choice, len(sequence.prompt) - 1)
            output = backend.prefill(request.slot, tokens, request.written)
            token = output.choices()[0] if is_last else 0
            logits = output.logits()[0] if is_last and sequence.needs_logits else None
        except Exception as error:
            self._fail(request, error)
            return
        sequence.prefill_model_s += backend.model_seconds - model_begin
        request.written += len(tokens)
        self._counters.count_tokens(prompt=len(tokens))
        self._pace.prefilled(len(tokens), perf_counter() - begin)
        if is_last:
            self._prefilling.popleft()
            sequence.prefilled = True
            self._take_token(request, token, logits)
        else:
            self._slots.hold(request)

    def _take_token(self, request: Request, token: int, logits: Logits | None) -> None:
        """A request's newest token: into its text, into the next step unless it ends there, and to its reader."""
        sequence = request.sequence
        try:
            if token < 0:
                self._backend.clear(request.slot)
                check_finite(math.nan)
            token = accept(sequence, token, logits)
            self._note_time(request)
            chunk = next_chunk(sequence)
        except Exception as error:
            self._fail(request, error)
            return
        self._counters.count_tokens(generated=1)
        if chunk.finish_reason is None:
            self._slots.advance(request, token)
        else:
            self._leave(request, chunk.finish_reason)
        self._hand_out(request, chunk)

    def _note_time(self, request: Request) -> None:
        sequence, now, model_s = request.sequence, perf_counter(), self._backend.model_seconds
        if len(sequence.tokens) == 1:
            sequence.ttft_s = now - request.submitted
        else:
            gap = now - request.newest
            sequence.itl_s.append(gap)
            sequence.host_s.append(gap - (model_s - request.newest_model_s))
        request.newest, request.newest_model_s = now, model_s

    def _hand_out(self, request: Request, chunk: GenerationChunk) -> None:
        try:
            request.mailbox.put(chunk)
        except Exception as error:
            if request.sequence.finish_reason is None:
                self._fail(request, error)
            else:
                LOGGER.warning("request %s: its reader failed with the last chunk: %r", request.id, error)

    def _end_early(self, request: Request, reason: FinishReason) -> None:
        try:
            chunk = interrupted_chunk(request.sequence, reason)
        except Exception as error:
            self._fail(request, error)
            return
        self._leave(request, chunk.finish_reason or reason)
        self._hand_out(request, chunk)

    def _fail(self, request: Request, error: Exception) -> None:
        sequence = request.sequence
        request.error = RequestFailed(f"request {request.id} failed after {len(sequence.tokens)} token(s): {error}")
        request.error.__cause__ = error
        sequence.finish_reason = "failed"
        self._leave(request, "failed")
        self._hand_out(request, GenerationChunk("", None, None, "failed", sequence.timings()))

    def _leave(self, request: Request, reason: FinishReason) -> None:
        """Before the last chunk goes out: whoever reads it finds the row free and the request counted."""
        running = request.slot >= 0
        if request in self._prefilling:
            self._prefilling.remove(request)
        if running:
            self._slots.release(request)
        elif request in self._waiting:
            self._waiting.remove(request)
        self._counters.leave(reason, running=running)
