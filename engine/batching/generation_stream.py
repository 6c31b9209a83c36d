"""Generating on the caller's thread: the scheduler is driven step by step, as its tokens are asked for."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from time import perf_counter

from starling.engine.backends.backend import Backend
from starling.engine.batching.draft_model import DraftModel
from starling.engine.batching.prefill_pacing import PromptsFirst
from starling.engine.batching.prefix_store import PrefixStore
from starling.engine.batching.request import Handout, PromptGroup, Request
from starling.engine.batching.scheduler import Scheduler
from starling.engine.batching.serving_stats import ServingCounters
from starling.engine.errors import UserError
from starling.engine.generation.results import GenerationChunk, GenerationResult
from starling.engine.generation.sequence import GenerationSequence, interrupt, interrupted_chunk
from starling.engine.names import Speculation

#: Requests with their chunks, as the tokens come.
Chunks = Generator[Handout, None, None]


def generate(
    backend: Backend,
    sequences: list[GenerationSequence],
    speculation: Speculation | None = None,
    *,
    one_prompt: bool = False,
    draft: DraftModel | None = None,
) -> Chunks:
    """Run the sequences on rows 0, 1, … of the backend's cache; yields each token as its request and chunk.

    Their prompts are prefilled one after the other, and then they decode together. With `one_prompt` they have the same
    one, which is prefilled once where the backend copies rows. `speculation` needs a backend that verifies, and by
    "draft-model" a `draft`. Ctrl-C ends every row with a last chunk ("interrupted") in place of the exception. Raises
    what a row failed with.
    """
    counters = ServingCounters(len(sequences), 0)
    copies = PrefixStore.of(backend, 0) if one_prompt else None
    scheduler = Scheduler(
        backend,
        counters,
        PromptsFirst(measures=speculation is not None),
        speculation=speculation,
        draft=draft,
        prefixes=copies,
    )
    called = perf_counter() - sum(sequence.encode_s for sequence in sequences)
    requests = [Request(sequence) for sequence in sequences]
    group = PromptGroup(requests) if one_prompt else None
    for request in requests:
        request.sequence.submitted, request.group = called, group
        counters.enter()
        scheduler.add(request)
    try:
        while (handouts := scheduler.step()) is not None:
            for handout in handouts:
                error = handout[0].error
                if error is not None:
                    raise error.__cause__ or error
                given = perf_counter()
                yield handout
                scheduler.idle_s += perf_counter() - given
    except KeyboardInterrupt:
        for request in requests:
            if not request.sequence.closed:
                yield request, interrupted_chunk(request.sequence)


class GenerationStream(Iterator[GenerationChunk]):
    """The chunks as they come. After the last one, or after `close`, `result` is the whole generation.

    Ctrl-C while the engine works becomes a last chunk with finish_reason "interrupted". Where it hits the consumer's
    own code instead, `close()` ends the generation and `result` has the text so far.
    """

    def __init__(self, chunks: Chunks, sequences: list[GenerationSequence]) -> None:
        self._chunks = chunks
        self._sequences = sequences
        self._displaced = False

    def __iter__(self) -> GenerationStream:
        return self

    def __next__(self) -> GenerationChunk:
        if self._displaced:
            raise UserError("this stream was ended by a later generation on the same engine; read a stream to its end")
        return next(self._chunks)[1]

    def close(self) -> None:
        """End the generation here. Nothing happens when it has already ended."""
        self._chunks.close()
        for sequence in self._sequences:
            interrupt(sequence)

    def displace(self) -> None:
        """End the generation because another one needs the cache; reading on raises UserError."""
        self._displaced = any(sequence.finish_reason is None for sequence in self._sequences)
        self.close()

    @property
    def result(self) -> GenerationResult:
        """The generation so far: its text, tokens, timings; "interrupted" until it has come to its end."""
        return self._sequences[0].result()
