"""The thread on which one engine serves many requests."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from threading import Condition, Event, Thread, current_thread
from time import perf_counter
from types import TracebackType

from starling.engine.batching.chunk_queue import ChunkQueue
from starling.engine.batching.prefill_pacing import PrefillPace
from starling.engine.batching.request import NEVER, Request, RequestHandle
from starling.engine.batching.scheduler import Scheduler
from starling.engine.batching.serving_stats import ServingCounters, ServingStats
from starling.engine.batching.speculation import checked_speculation
from starling.engine.engine import Engine
from starling.engine.errors import ClosedError, QueueFullError, UserError
from starling.engine.generation.logits_processors import LogitsProcessor
from starling.engine.generation.results import GenerationChunk
from starling.engine.generation.sampling_params import SamplingParams

LOGGER = logging.getLogger(__name__)

_ELSEWHERE = "try again: another replica, or the restarted server, will answer"


class ServingLoop:
    """One engine on a thread of its own; many requests share its rows. Thread-safe.

    ```python
    with Engine("smollm2", max_batch=8) as engine, ServingLoop(engine) as loop:
        handle = loop.submit("The largest city in Japan is", SamplingParams(max_tokens=6))
        print(handle.result().text)
    ```
    """

    def __init__(
        self, engine: Engine, *, queue_limit: int = 128, prefill_chunk: int = 128, slowdown: float = 2.5
    ) -> None:
        """Take the engine over until `close`. `queue_limit` requests may wait beside those that have a row.

        Prompts are prefilled in chunks of at most `prefill_chunk` tokens; while requests decode, of so few that their
        inter-token latency grows to about `slowdown` times its quiet value. It speculates as the engine does. Raises
        UserError for a setting out of range, or where the engine serves another loop.
        """
        if queue_limit < 0 or prefill_chunk < 1 or not slowdown > 1:
            raise UserError(
                f"queue_limit={queue_limit}, prefill_chunk={prefill_chunk}, slowdown={slowdown}: "
                "give at least 0, at least 1, and above 1"
            )
        self.engine = engine
        self._queue_limit = queue_limit
        self._counters = ServingCounters(engine.max_batch, queue_limit)
        self._scheduler = Scheduler(
            engine.backend,
            self._counters,
            PrefillPace(prefill_chunk, slowdown),
            speculation=checked_speculation(engine.speculation, engine.backend),
        )
        self._arrived: list[Request] = []
        self._changed = Condition()
        self._closing = self._drains = False
        self._failure: BaseException | None = None
        self._ended = Event()
        self._thread = Thread(target=self._serve, name="starling-serving-loop", daemon=True)
        engine.reserve(self, lambda: self.close(drain=False))
        self._thread.start()

    def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        deadline_s: float | None = None,
        reply: bool = False,
        on_chunk: Callable[[GenerationChunk], None] | None = None,
        request_id: str | None = None,
        processors: Sequence[LogitsProcessor] = (),
    ) -> RequestHandle:
        """Queue a prompt, text or token ids, which is encoded on the caller's thread; returns at once.

        `deadline_s` ends the request so many seconds from now. With `reply` the text is one of its own, as for a chat.
        `on_chunk` gets every chunk on the loop's thread, the last one always with a finish_reason ("failed" too); it
        must be quick, and what it raises ends its request. `request_id` names it in messages (default: a new id).
        `processors` change its logits after those that `params` ask for; they are this request's own.

        Raises PromptError or SamplingError for bad input, QueueFullError where too many wait, ClosedError after
        `close`.
        """
        submitted = perf_counter()
        deadline = NEVER if deadline_s is None else submitted + _checked_seconds(deadline_s)
        sequence = self.engine.prepare(prompt, params or SamplingParams(), reply=reply, processors=processors)
        sequence.submitted = submitted
        request = Request(sequence, ChunkQueue(on_chunk))
        if request_id is not None:
            request.id = request_id
        request.deadline = deadline
        with self._changed:
            if self._failure is not None:
                raise ClosedError(
                    "the serving loop has ended by a failure",
                    detail=f"{self._failure!r}; open the engine again",
                    client_detail=_ELSEWHERE,
                )
            if self._closing:
                raise ClosedError(
                    "the serving loop is closed and takes no more requests",
                    detail="open another",
                    client_detail=_ELSEWHERE,
                )
            if not self._counters.enter():
                raise QueueFullError(
                    f"{self._queue_limit} request(s) already wait beside the {self.engine.max_batch} that run",
                    detail="try again later, or open the loop with a larger queue_limit",
                    client_detail="try again later",
                )
            self._arrived.append(request)
            self._changed.notify_all()
        return RequestHandle(request)

    @property
    def failure(self) -> BaseException | None:
        """What ended the loop's thread, which no request may do; None while it runs, and after `close`."""
        return self._failure

    def stats(self) -> ServingStats:
        """What runs and waits now, and the totals since the start."""
        return self._counters.snapshot()

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Take no more requests and end the thread; the engine can then be used directly again.

        With `drain` all accepted requests are finished first, for `timeout_s` seconds at most; what is left then, or
        everything without `drain`, ends as "cancelled". From a callback on the loop's own thread it returns at once.
        """
        with self._changed:
            self._drains = drain and (self._drains or not self._closing)
            self._closing = True
            self._changed.notify_all()
        if current_thread() is self._thread:
            return
        # An event, not Thread.join: a join that Ctrl-C interrupts takes a running thread for an ended one.
        if not self._ended.wait(timeout_s):
            self._drains = False
            self._ended.wait()
        self.engine.release(self)

    def __enter__(self) -> ServingLoop:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(drain=error is None)

    def _serve(self) -> None:
        try:
            while self._take_arrived():
                try:
                    self._scheduler.serve_step()
                except Exception as error:  # a bug here: no request may wait for ever because of it
                    LOGGER.exception("a step of the serving loop failed")
                    self._scheduler.fail_all(error)
        except BaseException as error:
            self._end_by(error)
        finally:
            self._ended.set()

    def _end_by(self, error: BaseException) -> None:
        """The thread ends, whatever it was that ended it: take nothing more, and let nobody wait."""
        LOGGER.critical("the serving loop has ended and answers nobody any more: %r", error, exc_info=error)
        with self._changed:
            self._failure, self._closing = error, True
            arrived, self._arrived = self._arrived, []
        for request in arrived:
            self._scheduler.add(request)
        self._scheduler.fail_all(error if isinstance(error, Exception) else RuntimeError(repr(error)))

    def _take_arrived(self) -> bool:
        """Wait for work, and queue what has come; False when there is none and no more may come."""
        with self._changed:
            while not self._arrived and self._scheduler.idle:
                if self._closing:
                    return False
                self._changed.wait()
            arrived, self._arrived = self._arrived, []
        for request in arrived:
            self._scheduler.add(request)
        if self._closing and not self._drains:
            self._scheduler.cancel_all()
        return True


def _checked_seconds(deadline_s: float) -> float:
    try:
        seconds = float(deadline_s)
    except OverflowError:  # an integer beyond all floats
        return NEVER
    if not seconds > 0:
        raise UserError(f"deadline_s is {deadline_s}: give seconds above 0, or None", field="deadline_s")
    return seconds
