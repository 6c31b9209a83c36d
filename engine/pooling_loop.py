"""The thread on which one engine scores or embeds the texts of many requests."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from threading import Condition, Event, Thread
from time import perf_counter
from types import TracebackType

import numpy as np

from starling.engine.backends.pooling_backend import Vectors
from starling.engine.batching.serving_stats import ServingCounters, ServingStats
from starling.engine.engine import Engine
from starling.engine.errors import BackendError, ClosedError, QueueFullError, RequestFailed, StarlingError, UserError
from starling.engine.generation.results import FinishReason
from starling.engine.pooling.runs import check_finite_numbers, next_group, run_group
from starling.engine.pooling.text_pooler import PreparedText

LOGGER = logging.getLogger(__name__)

_ELSEWHERE = "try again: another replica, or the restarted server, will answer"


@dataclass(frozen=True, slots=True)
class PoolingTimings:
    """A request that ended. `prompt_tokens` are those of its texts; seconds from its submission.

    `queue_s` to the start of the first run that has a text of it, `total_s` to the end. A `reason` other than "stop" is
    of a request whose numbers nobody got.
    """

    prompt_tokens: int
    queue_s: float
    total_s: float
    reason: FinishReason


@dataclass(slots=True, eq=False)
class _Job:
    """The texts of one request; those of `done` have their numbers. `started` None: no text has run."""

    texts: Sequence[PreparedText]
    vectors: Vectors
    future: Future[Vectors] = field(default_factory=Future)
    done: int = 0
    submitted: float = field(default_factory=perf_counter)
    started: float | None = None

    @property
    def unwanted(self) -> bool:
        return self.future.done()


class PoolingLoop:
    """An engine that scores or embeds, on a thread of its own: texts of several requests share runs. Thread-safe.

    ```python
    with Engine("starling-rm", max_batch=8) as engine, PoolingLoop(engine) as loop:
        print(loop.submit([engine.pooler.prepare("Hello")]).result())
    ```
    """

    def __init__(self, engine: Engine, *, queue_limit: int = 128) -> None:
        """Take the engine over until `close`. `queue_limit` requests may wait beside `max_batch` that run.

        Raises UserError where the engine generates text, is in use already, or `queue_limit` is below 0.
        """
        if queue_limit < 0:
            raise UserError(f"queue_limit is {queue_limit}: give at least 0")
        self.engine, self._pooler = engine, engine.pooler
        self._counters = ServingCounters(engine.max_batch, queue_limit)
        #: Called with each request that ended, on the thread that ended it.
        self.on_end: Callable[[PoolingTimings], None] | None = None
        #: Every text that waits, the oldest first, with the job that it is of.
        self._waiting: list[tuple[_Job, int]] = []
        self._arrived: list[_Job] = []
        self._changed = Condition()
        self._closing = False
        self._failure: BaseException | None = None
        self._ended = Event()
        engine.reserve(self, self.close)
        self._thread = Thread(target=self._serve, name="starling-pooling-loop", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> BaseException | None:
        """What ended the loop's thread, which no request may do; None while it runs, and after `close`."""
        return self._failure

    def submit(self, texts: Sequence[PreparedText]) -> Future[Vectors]:
        """Queue texts that `engine.pooler.prepare` made; their numbers float32 [texts, width], once they are there.

        Cancelling the result drops the texts that have not run. Its exception is RequestFailed where a run fails or a
        text's numbers are not finite. Raises QueueFullError where too many wait, ClosedError after `close`.
        """
        job = _Job(texts, np.zeros((len(texts), self._pooler.backend.width), np.float32))
        if not texts:
            job.future.set_result(job.vectors)
            return job.future
        with self._changed:
            if self._closing:
                problem = "has ended by a failure" if self._failure else "is closed and takes no more requests"
                raise ClosedError(f"the pooling loop {problem}", detail="open another", client_detail=_ELSEWHERE)
            if not self._counters.enter():
                stats = self._counters.snapshot()
                raise QueueFullError(
                    f"{stats.running + stats.waiting} request(s) wait or run already",
                    detail="try again later, or open the loop with a larger queue_limit",
                    client_detail="try again later",
                )
            job.future.add_done_callback(lambda _: self._count_end(job))
            self._arrived.append(job)
            self._changed.notify_all()
        return job.future

    def close(self) -> None:
        """Take no more requests and end the thread; what has not run fails with ClosedError."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._ended.wait()
        self.engine.release(self)

    def __enter__(self) -> PoolingLoop:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def stats(self) -> ServingStats:
        """What has been done and is being done; a request runs from its first text's run on. Nothing is generated."""
        return self._counters.snapshot()

    def _count_end(self, job: _Job) -> None:
        """On the thread that ended it: the loop's, or one that cancelled."""
        now, tokens = perf_counter(), sum(text.tokens for text in job.texts)
        with self._changed:  # `_begin` must not come between: it would count a job as running that has ended
            started, reason = job.started, _reason(job.future)
            self._counters.leave(reason, running=started is not None)
        if self.on_end is not None:
            begun = now if started is None else started
            self.on_end(PoolingTimings(tokens, begun - job.submitted, now - job.submitted, reason))

    def _begin(self, group: Sequence[tuple[_Job, int]]) -> None:
        """Those of the jobs that have no text yet that ran are running now."""
        with self._changed:
            for job, index in group:
                self._counters.prompt_tokens += len(job.texts[index].ids)
                if job.started is None and not job.unwanted:
                    job.started = perf_counter()
                    self._counters.admit()

    def _serve(self) -> None:
        try:
            while self._take_arrived():
                self._run_group()
        except BaseException as error:  # a bug here: no request may wait for ever because of it
            LOGGER.critical("the pooling loop has ended and answers nobody any more: %r", error, exc_info=error)
            self._failure = error
        finally:
            with self._changed:
                self._closing = True
                left = [*(job for job, _ in self._waiting), *self._arrived]
            ended = ClosedError("the pooling loop has ended", detail="open another", client_detail=_ELSEWHERE)
            for job in left:
                _fail(job, ended)
            self._ended.set()

    def _take_arrived(self) -> bool:
        """Wait for texts; False when no more may come."""
        with self._changed:
            while not self._arrived and not self._waiting and not self._closing:
                self._changed.wait()
            if self._closing:
                return False
            arrived, self._arrived = self._arrived, []
        self._waiting += [(job, index) for job in arrived for index in range(len(job.texts))]
        return True

    def _run_group(self) -> None:
        """The oldest text that is still wanted, and those that run well beside it."""
        self._waiting = [(job, index) for job, index in self._waiting if not job.unwanted]
        if not self._waiting:
            return
        backend, pooling = self._pooler.backend, self._pooler.pooling
        places = next_group([job.texts[index].ids for job, index in self._waiting], backend, pooling.long_from)
        group = [self._waiting[place] for place in places]
        taken = set(places)
        self._waiting = [text for place, text in enumerate(self._waiting) if place not in taken]
        self._begin(group)
        try:
            texts = [job.texts[index].ids for job, index in group]
            for vectors in run_group(backend, texts, mean=pooling.read_at == "mean"):
                if all(job.unwanted for job, _ in group):
                    return
                if vectors is not None:
                    for (job, index), vector in zip(group, vectors, strict=True):
                        _accept(job, index, vector)
        except Exception as error:
            for job, _ in group:
                _fail(job, error)


def _reason(future: Future[Vectors]) -> FinishReason:
    if future.cancelled():
        return "cancelled"
    return "stop" if future.exception() is None else "failed"


def _accept(job: _Job, index: int, vector: Vectors) -> None:
    try:
        check_finite_numbers(vector)
    except BackendError as error:
        _fail(job, error)
        return
    job.vectors[index] = vector
    job.done += 1
    if job.done == len(job.texts):
        try:
            job.future.set_result(job.vectors)
        except InvalidStateError:  # cancelled a moment ago
            return


def _fail(job: _Job, error: Exception) -> None:
    failure = error
    if not isinstance(error, ClosedError):
        failure = RequestFailed(f"scoring failed: {error}" if isinstance(error, StarlingError) else repr(error))
        failure.__cause__ = error
    try:
        job.future.set_exception(failure)
    except InvalidStateError:
        return
