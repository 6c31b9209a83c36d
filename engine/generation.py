"""The decode loop: prefill each row, then choose, detokenize, check for the end, and decode, until all rows are done."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple

import numpy as np

from starling.engine.backend import Backend, Logits, Tokens
from starling.engine.detokenizer import Detokenizer
from starling.engine.errors import UserError
from starling.engine.results import FinishReason, GenerationChunk, GenerationResult, Timings
from starling.engine.sampling import Sampler, SamplingParams, TokenLogprob, logprobs, make_sampler
from starling.engine.stops import StopMatcher
from starling.engine.tokenizer import Tokenizer

_STOP: FinishReason = "stop"
_LENGTH: FinishReason = "length"
RowChunks = Generator[tuple[int, GenerationChunk], None, None]


class Step(NamedTuple):
    """One chosen token, and the text that became certain with it."""

    token: int
    text: str
    logprob: TokenLogprob | None


@dataclass(slots=True)
class Sequence:
    """A prompt and its answer so far. Everything the loop changes about a row is here."""

    prompt: tuple[int, ...]
    #: Prompt tokens that the row's cache already holds, from its beginning.
    reused: int
    #: New tokens at most: max_tokens, or fewer where the cache ends.
    limit: int
    top_logprobs: int | None
    stop_ids: frozenset[int]
    sample: Sampler
    detokenizer: Detokenizer
    stops: StopMatcher
    #: Seconds that encoding the prompt took; part of the time to first token.
    encode_s: float = 0.0
    steps: list[Step] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    #: True once the last chunk was handed out.
    closed: bool = False
    handed_out: int = 0
    prefilled: bool = False
    ttft_s: float = 0.0
    prefill_model_s: float = 0.0
    itl_s: list[float] = field(default_factory=list)
    decode_model_s: float = 0.0

    def token_at(self, position: int) -> int:
        """The token at a position of prompt and answer."""
        behind = position - len(self.prompt)
        return self.steps[behind].token if behind >= 0 else self.prompt[position]

    def cached_ids(self) -> tuple[int, ...]:
        """Ids that the row's cache surely holds. The newest token is not among them: decoding it writes it."""
        if not self.prefilled:
            return self.prompt[: self.reused]
        return self.prompt + tuple(step.token for step in self.steps[:-1])

    def result(self) -> GenerationResult:
        """The answer so far; "interrupted" where it had not come to its end."""
        logprobs_ = tuple(step.logprob for step in self.steps if step.logprob is not None)
        return GenerationResult(
            text="".join(step.text for step in self.steps),
            tokens=tuple(step.token for step in self.steps),
            finish_reason=self.finish_reason or "interrupted",
            logprobs=None if self.top_logprobs is None else logprobs_,
            prompt_tokens=self.prompt,
            timings=self.timings(),
        )

    def timings(self) -> Timings:
        """Timings so far."""
        return Timings(
            prompt_tokens=len(self.prompt),
            new_tokens=len(self.steps),
            reused_tokens=self.reused,
            ttft_s=self.ttft_s,
            prefill_model_s=self.prefill_model_s,
            itl_s=tuple(self.itl_s),
            decode_model_s=self.decode_model_s,
        )


def make_sequence(
    prompt: tuple[int, ...],
    params: SamplingParams,
    tokenizer: Tokenizer,
    *,
    eos: tuple[int, ...],
    max_seq: int,
    reused: int = 0,
    encode_s: float = 0.0,
) -> Sequence:
    """A sequence ready to run. The last token needs no cache position, so the cache has room for one more than it holds."""
    return Sequence(
        prompt=prompt,
        reused=reused,
        limit=min(params.max_tokens, max_seq + 1 - len(prompt)),
        top_logprobs=params.logprobs,
        stop_ids=frozenset(params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, *eos)),
        sample=make_sampler(params, prompt),
        detokenizer=tokenizer.detokenizer(prompt),
        stops=StopMatcher(params.stop),
        encode_s=encode_s,
    )


def generate(backend: Backend, sequences: list[Sequence]) -> RowChunks:
    """Run the sequences on rows 0, 1, … of the backend's cache; yields (row, chunk) for each token.

    Ctrl-C ends every row with a last chunk ("interrupted") in place of the exception.
    """
    try:
        elapsed = 0.0
        for row, sequence in enumerate(sequences):
            elapsed = prefill(backend, row, sequence, elapsed)
            yield row, next_chunk(sequence)
        tokens, positions = np.zeros((2, len(sequences)), dtype=np.int64)
        while any(sequence.finish_reason is None for sequence in sequences):
            for row in decode(backend, sequences, tokens, positions):
                yield row, next_chunk(sequences[row])
    except KeyboardInterrupt:
        for row, sequence in enumerate(sequences):
            if not sequence.closed:
                yield row, interrupted_chunk(sequence)


def prefill(backend: Backend, row: int, sequence: Sequence, elapsed: float) -> float:
    """Write the prompt's new tokens into the row and choose the first token; `elapsed` seconds went by before."""
    begin, model_begin = perf_counter(), backend.model_seconds
    tokens = np.array(sequence.prompt[sequence.reused :], dtype=np.int64)
    logits = backend.prefill(row, tokens, sequence.reused)
    sequence.prefilled = True
    accept(sequence, logits)
    elapsed += sequence.encode_s + perf_counter() - begin
    sequence.ttft_s = elapsed
    sequence.prefill_model_s = backend.model_seconds - model_begin
    return elapsed


def decode(backend: Backend, sequences: list[Sequence], tokens: Tokens, positions: Tokens) -> list[int]:
    """One step of every row up to the last unfinished one; returns the rows that got a token.

    `tokens` and `positions` are int64 [rows] to fill: the newest token of each row, and where it is written.
    """
    begin, model_begin = perf_counter(), backend.model_seconds
    live = [row for row, sequence in enumerate(sequences) if sequence.finish_reason is None]
    rows = live[-1] + 1
    for row, sequence in enumerate(sequences[:rows]):
        # A finished row between unfinished ones writes what stands there once more: that changes nothing.
        position = min(len(sequence.prompt) + len(sequence.steps), backend.max_seq) - 1
        tokens[row], positions[row] = sequence.token_at(position), position
    logits = backend.decode(tokens[:rows], positions[:rows])
    for row in live:
        accept(sequences[row], logits[row])
    model_s, seconds = backend.model_seconds - model_begin, perf_counter() - begin
    for row in live:
        sequences[row].itl_s.append(seconds)
        sequences[row].decode_model_s += model_s
    return live


def accept(sequence: Sequence, logits: Logits) -> None:
    """Choose the next token from logits [vocab], and see whether it ends the sequence."""
    token = sequence.sample(logits)
    top = sequence.top_logprobs
    logprob = None if top is None else logprobs(logits, token, top)
    text, reason = "", None
    if token in sequence.stop_ids:
        reason = _STOP
    else:
        text, stopped = sequence.stops.push(sequence.detokenizer.push(token))
        if stopped:
            reason = _STOP
        elif len(sequence.steps) + 1 >= sequence.limit:
            reason = _LENGTH
    if reason is not None:
        text, reason = _with_held_back(sequence, text, reason)
    # One append commits the token, so that Ctrl-C finds either all of it or nothing.
    sequence.steps.append(Step(token, text, logprob))
    sequence.finish_reason = reason


def _with_held_back(sequence: Sequence, text: str, reason: FinishReason) -> tuple[str, FinishReason]:
    """The text with what detokenizer and stop matcher still held; it may itself complete a stop string."""
    tail, stopped = sequence.stops.push(sequence.detokenizer.flush())
    return text + tail + sequence.stops.flush(), _STOP if stopped else reason


def next_chunk(sequence: Sequence) -> GenerationChunk:
    """The newest token as a chunk; the last one carries the reason and the timings."""
    step = sequence.steps[-1]
    sequence.handed_out = len(sequence.steps)
    if sequence.finish_reason is None:
        return GenerationChunk(step.text, step.token, step.logprob)
    sequence.closed = True
    return GenerationChunk(step.text, step.token, step.logprob, sequence.finish_reason, sequence.timings())


def interrupted_chunk(sequence: Sequence) -> GenerationChunk:
    """The last chunk of a row that Ctrl-C ended: text that was held back or not handed out yet."""
    interrupt(sequence)
    text = "".join(step.text for step in sequence.steps[sequence.handed_out :])
    sequence.closed = True
    return GenerationChunk(text, None, None, sequence.finish_reason, sequence.timings())


def interrupt(sequence: Sequence) -> None:
    """End an unfinished sequence where it is, with the text that was held back."""
    if sequence.finish_reason is None:
        tail, sequence.finish_reason = _with_held_back(sequence, "", "interrupted")
        if sequence.steps:
            newest = sequence.steps[-1]
            sequence.steps[-1] = newest._replace(text=newest.text + tail)


class GenerationStream(Iterator[GenerationChunk]):
    """The chunks as they come. After the last one, or after `close`, `result` is the whole generation.

    Ctrl-C while the engine works becomes a last chunk with finish_reason "interrupted". Where it hits the consumer's
    own code instead, `close()` ends the generation and `result` has the text so far.
    """

    def __init__(self, chunks: RowChunks, sequences: list[Sequence]) -> None:
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
