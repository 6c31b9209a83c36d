"""What a serving loop has done and is doing, counted such that the figures always come out even."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock
from types import MappingProxyType

from starling.engine.generation.results import FinishReason


@dataclass(frozen=True, slots=True)
class ServingStats:
    """One moment of a serving loop. submitted = waiting + running + the sum of `ended`."""

    #: Rows of the KV cache.
    max_batch: int
    #: Requests that have a row: prefilling or decoding.
    running: int
    #: Requests that wait for a row.
    waiting: int
    #: Requests accepted since the start.
    submitted: int
    #: Requests refused since the start, because too many waited.
    refused: int
    #: Ended requests by finish reason.
    ended: Mapping[FinishReason, int]
    #: Prompt tokens prefilled, and tokens generated, those of requests that were ended early too.
    prompt_tokens: int
    generated_tokens: int
    #: Prompt tokens that known prefixes were asked for, and those of them that were copied in place of a prefill.
    prefix_queries: int = 0
    prefix_hits: int = 0
    #: Drafts that were verified, one for each row and step; their tokens, and those of them that were right.
    drafts: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class ServingCounters:
    """Thread-safe counters behind `ServingStats`."""

    def __init__(self, max_batch: int, queue_limit: int) -> None:
        self._max_batch, self._queue_limit = max_batch, queue_limit
        self._lock = Lock()
        self._running = self._waiting = self._submitted = self._refused = 0
        self._ended: Counter[FinishReason] = Counter()
        #: Tokens prefilled and generated: the scheduler's thread alone adds to them, without a call for each token.
        self.prompt_tokens = self.generated_tokens = 0
        self.prefix_queries = self.prefix_hits = 0
        self.drafts = self.drafted_tokens = self.accepted_tokens = 0

    def enter(self, requests: int = 1) -> bool:
        """Count requests as waiting; False, and all counted as refused, where the queue has no room for all of them."""
        with self._lock:
            accepted = self._running + self._waiting + requests <= self._max_batch + self._queue_limit
            if accepted:
                self._submitted += requests
                self._waiting += requests
            else:
                self._refused += requests
            return accepted

    def admit(self) -> None:
        """A waiting request got a row."""
        with self._lock:
            self._waiting -= 1
            self._running += 1

    def leave(self, reason: FinishReason, *, running: bool) -> None:
        """A request that was running, or waiting, has ended."""
        with self._lock:
            self._running -= running
            self._waiting -= not running
            self._ended[reason] += 1

    def snapshot(self) -> ServingStats:
        """The figures at this moment."""
        with self._lock:
            return ServingStats(
                max_batch=self._max_batch,
                running=self._running,
                waiting=self._waiting,
                submitted=self._submitted,
                refused=self._refused,
                ended=MappingProxyType(dict(self._ended)),
                prompt_tokens=self.prompt_tokens,
                generated_tokens=self.generated_tokens,
                prefix_queries=self.prefix_queries,
                prefix_hits=self.prefix_hits,
                drafts=self.drafts,
                drafted_tokens=self.drafted_tokens,
                accepted_tokens=self.accepted_tokens,
            )
