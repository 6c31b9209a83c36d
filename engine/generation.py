"""The decode loop: prefill each row; then choose, detokenize, look for the end, and decode, until all rows are done."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from time import perf_counter

import numpy as np

from starling.engine.backend import Backend, Tokens
from starling.engine.errors import UserError
from starling.engine.results import GenerationChunk, GenerationResult
from starling.engine.sequence import GenerationSequence, accept, interrupt, interrupted_chunk, next_chunk

RowChunks = Generator[tuple[int, GenerationChunk], None, None]


def generate(backend: Backend, sequences: list[GenerationSequence]) -> RowChunks:
    """Run the sequences on rows 0, 1, … of the backend's cache; yields (row, chunk) for each token.

    Ctrl-C ends every row with a last chunk ("interrupted") in place of the exception.
    """
    try:
        elapsed = 0.0
        for row, sequence in enumerate(sequences):
            elapsed = prefill(backend, row, sequence, elapsed)
            yield row, next_chunk(sequence)
        tokens, positions = np.zeros((2, len(sequences)), dtype=np.int64)
        while live := [row for row, sequence in enumerate(sequences) if sequence.finish_reason is None]:
            decode(backend, sequences, live, tokens, positions)
            for row in live:
                yield row, next_chunk(sequences[row])
    except KeyboardInterrupt:
        for row, sequence in enumerate(sequences):
            if not sequence.closed:
                yield row, interrupted_chunk(sequence)


def prefill(backend: Backend, row: int, sequence: GenerationSequence, elapsed: float) -> float:
    """Write the prompt's new tokens into the row and choose the first token; `elapsed` seconds went by before."""
    begin, model_begin = perf_counter(), backend.model_seconds
    tokens = np.array(sequence.prompt[sequence.reused :], dtype=np.int64)
    logits = backend.prefill(row, tokens, sequence.reused)
    sequence.prefilled = True
    accept(sequence, logits, backend.likeliest(logits[None])[0])
    elapsed += sequence.encode_s + perf_counter() - begin
    sequence.ttft_s = elapsed
    sequence.prefill_model_s = backend.model_seconds - model_begin
    return elapsed


def decode(
    backend: Backend, sequences: list[GenerationSequence], live: list[int], tokens: Tokens, positions: Tokens
) -> None:
    """One step of every row up to the last of the unfinished ones, `live`.

    `tokens` and `positions` are int64 [rows] to fill: the newest token of each row, and where it is written.
    """
    begin, model_begin = perf_counter(), backend.model_seconds
    rows = live[-1] + 1
    for row in range(rows):
        # A finished row between unfinished ones writes what stands there once more: that changes nothing.
        tokens[row], positions[row] = sequences[row].newest(backend.max_seq)
    logits = backend.decode(tokens[:rows], positions[:rows])
    likeliest = backend.likeliest(logits)
    for row in live:
        accept(sequences[row], logits[row], likeliest[row])
    model_s, seconds = backend.model_seconds - model_begin, perf_counter() - begin
    for row in live:
        sequences[row].itl_s.append(seconds)
        sequences[row].host_s.append(seconds - model_s)


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
