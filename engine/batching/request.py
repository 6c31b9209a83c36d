"""One request: what the scheduler knows of it, and the handle of the caller who submitted it to a serving loop."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from math import inf
from uuid import uuid4

from starling.engine.backends.logits import Logits
from starling.engine.batching.chunk_queue import ChunkQueue
from starling.engine.errors import DeadlineExceeded, RequestFailed
from starling.engine.generation.prompt_lookup import PromptLookup
from starling.engine.generation.results import GenerationChunk, GenerationResult
from starling.engine.generation.sequence import GenerationSequence

NEVER = inf
#: Seconds between two looks at a request that nobody reads any more; a step takes as long.
_SETTLE_POLL_S = 0.02


@dataclass(slots=True, eq=False)
class PromptGroup:
    """Requests for several answers to one prompt: the first of them prefills it, the others copy its row."""

    members: list[Request] = field(default_factory=list)
    #: What the model's run over the prompt left: the backend's choice, and logits [vocab] where they are needed.
    token: int = -1
    logits: Logits | None = None

    def source(self) -> Request | None:
        """A member whose row holds the prompt; None where there is none, or the run left nothing to choose from."""
        if self.token < 0:
            return None
        return next((one for one in self.members if one.row >= 0 and one.sequence.prefilled), None)

    def keep(self, token: int, logits: Logits | None) -> None:
        """Keep what the run left, which is valid until the backend's next call, as long as a member has use for it."""
        self.token = token
        others = any(not one.begun for one in self.members)
        self.logits = None if logits is None or not others else logits.copy()

    def release(self) -> None:
        """Forget the logits once no member has use for them."""
        if all(one.begun for one in self.members):
            self.logits = None


@dataclass(slots=True, eq=False)
class Request:
    """A sequence on its way through the scheduler. Times are of the scheduler's clock, in seconds."""

    sequence: GenerationSequence
    #: Where a serving loop puts its chunks.
    queue: ChunkQueue = field(default_factory=ChunkQueue)
    deadline: float = NEVER
    id: str = field(default_factory=lambda: uuid4().hex)
    #: Set by any thread; the scheduler looks at it before each step.
    cancelled: bool = False
    #: Row of the cache; -1 while it waits, and when it has ended.
    row: int = -1
    #: When it got the row.
    admitted: float = 0.0
    #: Prompt tokens that the row holds.
    written: int = 0
    #: Of requests that wait the lowest is next; whose it is: what waits is fair between owners.
    priority: int = 0
    owner: str = ""
    #: Whether the scheduler has looked at its deadline.
    seen: bool = False
    #: Whether its prefill has begun.
    begun: bool = False
    #: Prefixes are shared among requests of the same salt.
    salt: str = ""
    #: Other requests of the same prompt; None for none.
    group: PromptGroup | None = None
    #: Where its drafts come from, once it decodes; None: it has none. `draft` is the newest, [] where none is known.
    lookup: PromptLookup | None = None
    draft: list[int] = field(default_factory=list)
    error: RequestFailed | None = None

    @property
    def is_scored(self) -> bool:
        """Whether its prompt's tokens are scored, which takes a run of its own."""
        return self.sequence.top_prompt_logprobs is not None


class RequestHandle(Iterator[GenerationChunk]):
    """What `ServingLoop.submit` returns: the chunks as they come, the result, and the way to cancel. Thread-safe.

    The chunks have one reader: iterate, or `chunks` in asyncio, or the `on_chunk` of `submit`.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self.id = request.id

    def cancel(self) -> None:
        """End the request within one step, as "cancelled". Nothing happens when it has ended already."""
        self._request.cancelled = True

    @property
    def done(self) -> bool:
        """Whether the request has ended, one way or another."""
        return self._request.queue.complete

    def __iter__(self) -> RequestHandle:
        return self

    def __next__(self) -> GenerationChunk:
        """The next chunk, waited for; the last one has finish_reason and timings. Raises RequestFailed."""
        chunk = self._request.queue.take()
        if chunk is None:
            raise StopIteration
        self._raise_failure(chunk)
        return chunk

    async def chunks(self) -> AsyncGenerator[GenerationChunk, None]:
        """The chunks, for asyncio. A reader that stops before the end, or is cancelled, cancels the request.

        Raises RequestFailed where the request failed.
        """
        try:
            async with aclosing(self._request.queue.chunks()) as chunks:
                async for chunk in chunks:
                    self._raise_failure(chunk)
                    yield chunk
        finally:
            if not self.done:
                self.cancel()

    def result(self, timeout_s: float | None = None) -> GenerationResult:
        """The whole generation, waited for; one that was cancelled has the text until then.

        Raises RequestFailed, DeadlineExceeded where its deadline passed, TimeoutError where waiting took longer than
        `timeout_s`. `partial` is the generation in those cases too.
        """
        if not self._request.queue.wait(timeout_s):
            raise TimeoutError(f"request {self.id} has not ended within {timeout_s} s: wait longer, or cancel it")
        if self._request.error is not None:
            raise self._request.error
        result = self.partial
        if result.finish_reason == "deadline":
            count = len(result.tokens)
            too_long = "" if count else ", or its prompt cannot be run by then"
            raise DeadlineExceeded(
                f"request {self.id}: its deadline passed after {count} token(s){too_long}; "
                "give it more time, or ask for fewer tokens"
            )
        return result

    async def settled(self) -> None:
        """Wait, in asyncio, until the request has ended; its chunks stay unread."""
        import asyncio

        while not self.done:
            await asyncio.sleep(_SETTLE_POLL_S)

    @property
    def partial(self) -> GenerationResult:
        """The generation so far, however it goes on or ended; "interrupted" while it has not ended."""
        return self._request.sequence.result()

    def _raise_failure(self, chunk: GenerationChunk) -> None:
        if chunk.finish_reason == "failed" and self._request.error is not None:
            raise self._request.error


#: A request, and what its reader gets.
Handout = tuple[Request, GenerationChunk]
