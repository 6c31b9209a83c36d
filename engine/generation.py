"""The decode loop: prefill each row; then choose, detokenize, look for the end, and decode, until all rows are done."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from time import perf_counter

import numpy as np

from starling.engine.backend import Backend
from starling.engine.batch import DecodeBatch
from starling.engine.decode_ahead import decode_ahead
from starling.engine.errors import UserError
from starling.engine.results import GenerationChunk, GenerationResult
from starling.engine.sequence import GenerationSequence, accept, interrupt, interrupted_chunk, next_chunk
from starling.engine.speculation import Speculation, decode_drafts

RowChunks = Generator[tuple[int, GenerationChunk], None, None]


def generate(
    backend: Backend, sequences: list[GenerationSequence], speculation: Speculation | None = None
) -> RowChunks:
    """Run the sequences on rows 0, 1, … of the backend's cache; yields (row, chunk) for each token.

    `speculation` needs a backend that verifies, and is for a single sequence: several are decoded without it.
    Ctrl-C ends every row with a last chunk ("interrupted") in place of the exception.
    """
    try:
        batch = DecodeBatch(sequences, backend.max_seq)
        elapsed = 0.0
        for row, sequence in enumerate(sequences):
            elapsed = prefill(backend, row, sequence, elapsed)
            batch.add(sequence)
            yield row, next_chunk(sequence)
        batch.drop_finished()
        if speculation is not None and len(sequences) == 1:
            for _ in decode_drafts(backend, sequences[0]):
                yield 0, next_chunk(sequences[0])
            return
        if backend.pipeline is not None and not any(sequence.needs_logits for sequence in sequences):
            for rows in decode_ahead(backend, backend.pipeline, batch):
                for row in rows:
                    yield row, next_chunk(sequences[row])
        while batch.live:
            rows = batch.live
            decode(backend, batch)
            for row in rows:
                yield row, next_chunk(sequences[row])
    except KeyboardInterrupt:
        for row, sequence in enumerate(sequences):
            if not sequence.closed:
                yield row, interrupted_chunk(sequence)


def prefill(backend: Backend, row: int, sequence: GenerationSequence, elapsed: float) -> float:
    """Write the prompt's new tokens into the row and choose the first token; `elapsed` seconds went by before."""
    begin, model_begin = perf_counter(), backend.model_seconds
    tokens = np.array(sequence.prompt[sequence.reused :], dtype=np.int64)
    if backend.pipeline is not None:
        backend.pipeline.choose(row, sequence.choice, len(sequence.prompt) - 1)
    output = backend.prefill(row, tokens, sequence.reused)
    sequence.prefilled = True
    accept(sequence, output.next_tokens()[0], output.logits()[0] if sequence.needs_logits else None)
    elapsed += sequence.encode_s + perf_counter() - begin
    sequence.ttft_s = elapsed
    sequence.prefill_model_s = backend.model_seconds - model_begin
    return elapsed


def decode(backend: Backend, batch: DecodeBatch) -> None:
    """One step of every row of the batch."""
    begin, model_begin = perf_counter(), backend.model_seconds
    live = batch.live
    output = backend.decode(batch.tokens, batch.positions)
    chosen = output.next_tokens()
    batch.accept(chosen, output.logits() if batch.needs_logits else None)
    batch.record(live, perf_counter() - begin, backend.model_seconds - model_begin)


class GenerationStream(Iterator[GenerationChunk]):
    """The chunks as they come. After the last one, or after `close`, `result` is the whole generation.

    Ctrl-C while the engine works becomes a last chunk with finish_reason "interrupted". Where it hits the consumer's
    own code instead, `close()` ends the generation and `result` has the text so far.
    """

    def __init__(self, chunks: RowChunks, sequences: list[GenerationSequence]) -> None:
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
