"""The thread on which one engine serves many requests."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from threading import Condition, Event, Thread, current_thread
from time import perf_counter
from types import TracebackType

from starling.engine.backends.backend import PREFIX_BLOCK
from starling.engine.batching.chunk_queue import ChunkQueue
from starling.engine.batching.prefill_pacing import PrefillPace
from starling.engine.batching.prefix_store import DEFAULT_PREFIX_CACHE, PrefixStore, stored_bytes
from starling.engine.batching.request import NEVER, PromptGroup, Request, RequestHandle
from starling.engine.batching.scheduler import Scheduler
from starling.engine.batching.serving_stats import ServingCounters, ServingStats
from starling.engine.batching.speculation import checked_speculation
from starling.engine.engine import Engine
from starling.engine.errors import ClosedError, QueueFullError, UserError
from starling.engine.generation.logits_processors import LogitsProcessor
from starling.engine.generation.results import GenerationChunk
from starling.engine.generation.sampling_params import SamplingParams

#: How many times its quiet value the inter-token latency grows beside a prompt: where both run in one step, and where
#: a step and a chunk after each other take twice as long as a step alone in any case.
SLOWDOWN, SLOWDOWN_APART = 1.5, 2.5

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
        self,
        engine: Engine,
        *,
        queue_limit: int = 128,
        prefill_chunk: int = 128,
        slowdown: float | None = None,
        prefix_cache: int = DEFAULT_PREFIX_CACHE,
    ) -> None:
        """Take the engine over until `close`. `queue_limit` requests may wait beside those that have a row.

        Prompts are prefilled in chunks of at most `prefill_chunk` tokens; while requests decode, of so few that their
        inter-token latency grows to about `slowdown` times its quiet value: by default 1.5 where the backend runs them
        in the same step (`Backend.most_mixed`), 2.5 where it cannot; to more while several prompts wait, the fewer
        requests run. It speculates as the engine does.
        Prefixes of prompts and answers are kept in at most `prefix_cache` bytes (0: none), and copied where a prompt
        begins with one, as far as the backend copies rows (ONNX Runtime on a CPU). Raises
        UserError for a setting out of range, or where the engine serves another loop.
        """
        if slowdown is None:
            slowdown = SLOWDOWN if engine.backend.most_mixed else SLOWDOWN_APART
        if queue_limit < 0 or prefill_chunk < 1 or not slowdown > 1 or prefix_cache < 0:
            raise UserError(
                f"queue_limit={queue_limit}, prefill_chunk={prefill_chunk}, slowdown={slowdown}, "
                f"prefix_cache={prefix_cache}: give at least 0, at least 1, above 1, and at least 0"
            )
        self.engine = engine
        self._queue_limit = queue_limit
        self._counters = ServingCounters(engine.max_batch, queue_limit)
        #: None where the backend copies no rows.
        self._prefixes = self._open_prefixes(prefix_cache)
        self._scheduler = Scheduler(
            engine.backend,
            self._counters,
            PrefillPace(prefill_chunk, slowdown),
            speculation=checked_speculation(engine.speculation, engine.backend, has_draft=engine.draft is not None),
            draft=engine.draft,
            prefixes=self._prefixes,
        )
        self._arrived: list[Request] = []
        self._changed = Condition()
        self._closing = self._drains = False
        self._failure: BaseException | None = None
        self._ended = Event()
        self._thread = Thread(target=self._serve, name="starling-serving-loop", daemon=True)
        engine.reserve(self, lambda: self.close(drain=False))
        self._thread.start()

    def _open_prefixes(self, size: int) -> PrefixStore | None:
        """Memory for known prefixes: with a draft model both caches know equally many tokens."""
        backend, draft = self.engine.backend, self.engine.draft
        if draft is None or self.engine.speculation != "draft-model":
            return PrefixStore.of(backend, size)
        share = stored_bytes(backend) / (stored_bytes(backend) + stored_bytes(draft.backend))
        draft.prefixes = PrefixStore.of(draft.backend, int(size * (1 - share)))
        return PrefixStore.of(backend, int(size * share))

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
        cache_salt: str = "",
        priority: int = 0,
        owner: str = "",
    ) -> RequestHandle:
        """Queue a prompt, text or token ids, which is encoded on the caller's thread; returns at once.

        `deadline_s` ends the request so many seconds from now. With `reply` the text is one of its own, as for a chat.
        `on_chunk` gets every chunk on the loop's thread, the last one always with a finish_reason ("failed" too); it
        must be quick, and what it raises ends its request. `request_id` names it in messages (default: a new id).
        `processors` change its logits after those that `params` ask for; they are this request's own. Known prefixes
        are shared among requests of the same `cache_salt` alone. Of the requests that wait one of the lowest `priority`
        is next, among them one of the `owner` who has had the fewest tokens of late, among those the first. One that
        cannot be prefilled before its deadline, as far as is known by then, is ended before it runs.

        Raises PromptError or SamplingError for bad input, QueueFullError where too many wait, ClosedError after
        `close`.
        """
        submitted = perf_counter()
        sequence = self.engine.prepare(prompt, params or SamplingParams(), reply=reply, processors=processors)
        request = Request(sequence, ChunkQueue(on_chunk), salt=cache_salt, priority=priority, owner=owner)
        if request_id is not None:
            request.id = request_id
        self._queue([request], submitted, deadline_s)
        return RequestHandle(request)

    def submit_choices(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        n: int = 1,
        *,
        deadline_s: float | None = None,
        reply: bool = False,
        on_chunk: Callable[[GenerationChunk], None] | None = None,
        request_ids: Sequence[str] | None = None,
        cache_salt: str = "",
        priority: int = 0,
        owner: str = "",
    ) -> list[RequestHandle]:
        """Queue `n` answers to one prompt, all or none of them. The prompt is prefilled once where rows are copied.

        They are those of `n` calls of `submit`, the i-th with the seed plus i where `params` have one. `on_chunk` gets
        the chunks of all, `request_ids` are their names. An answer that gets its row when no other of them has one any
        more goes by the known prefixes, as any request does. Raises what `submit` raises.
        """
        submitted = perf_counter()
        if n < 1 or (request_ids is not None and len(request_ids) != n):
            raise UserError(f"n is {n}: give at least 1, and as many request_ids", field="n")
        ids = self.engine.encode(prompt) if isinstance(prompt, str) else prompt
        chosen, group = params or SamplingParams(), PromptGroup()
        for index in range(n):
            sequence = self.engine.prepare(ids, chosen.of_choice(index), reply=reply)
            chunks = ChunkQueue(on_chunk)
            request = Request(sequence, chunks, salt=cache_salt, priority=priority, owner=owner, group=group)
            if request_ids is not None:
                request.id = request_ids[index]
            group.members.append(request)
        self._queue(group.members, submitted, deadline_s)
        return [RequestHandle(request) for request in group.members]

    def _queue(self, requests: Sequence[Request], submitted: float, deadline_s: float | None) -> None:
        """Hand requests to the thread, all or none of them."""
        deadline = NEVER if deadline_s is None else submitted + _checked_seconds(deadline_s)
        for request in requests:
            request.sequence.submitted, request.deadline = submitted, deadline
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
            if not self._counters.enter(len(requests)):
                raise QueueFullError(
                    f"{self._queue_limit} request(s) already wait beside the {self.engine.max_batch} that run",
                    detail="try again later, or open the loop with a larger queue_limit",
                    client_detail="try again later",
                )
            self._arrived += requests
            self._changed.notify_all()

    @property
    def copies_rows(self) -> bool:
        """Whether the backend copies rows: else no prefixes are known, and each answer to a prompt prefills it."""
        return self._prefixes is not None

    @property
    def most_together(self) -> int:
        """How many requests run and wait at once at most."""
        return self.engine.max_batch + self._queue_limit

    @property
    def prefix_tokens(self) -> int:
        """How many tokens the known prefixes may have together."""
        return 0 if self._prefixes is None else self._prefixes.capacity * PREFIX_BLOCK

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
        if self.engine.draft is not None:
            self.engine.draft.prefixes = None
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
