"""One row of a generation: a prompt and its answer so far, and how a token is taken into it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter

from starling.engine.backends.backend import GREEDY, DeviceChoice, StepOutput
from starling.engine.backends.logits import Logits, check_finite
from starling.engine.generation.logits_processors import LogitsProcessor, logits_processors
from starling.engine.generation.results import FinishReason, GenerationChunk, GenerationResult, Timings
from starling.engine.generation.sampler import Sampler, TokenLogprob, device_choice, logprobs, make_sampler
from starling.engine.generation.sampling_params import SamplingParams
from starling.engine.text.detokenizer import Detokenizer
from starling.engine.text.grammar_state import GrammarState
from starling.engine.text.stop_strings import StopMatcher
from starling.engine.text.tokenizer import Tokenizer

_STOP: FinishReason = "stop"
_LENGTH: FinishReason = "length"


@dataclass(slots=True)
class GenerationSequence:
    """A prompt and its answer so far. Everything the loop changes about a row is here."""

    prompt: tuple[int, ...]
    #: Prompt tokens that the row's cache already holds, from its beginning.
    reused: int
    #: New tokens at most: max_tokens, or fewer where the cache ends.
    limit: int
    top_logprobs: int | None
    stop_ids: frozenset[int]
    #: None: the backend's choice is taken.
    sample: Sampler | None
    detokenizer: Detokenizer
    #: None where there is no stop string.
    stops: StopMatcher | None
    #: Tokens before the first whose text may have one.
    min_tokens: int = 0
    #: Its place in its grammar, where it has one.
    grammar: GrammarState | None = None
    #: Seconds that encoding the prompt took; part of the time to first token.
    encode_s: float = 0.0
    #: How many of the likeliest tokens to report for each token of the prompt; None: the prompt is not scored.
    top_prompt_logprobs: int | None = None
    #: How a backend that chooses tokens itself chooses; where `sample` is set its choice is not taken.
    choice: DeviceChoice = GREEDY
    #: The answer. A token belongs to it once it is in `tokens`, which comes last: of one that Ctrl-C fell into, `texts`
    #: may already have the text.
    tokens: list[int] = field(default_factory=list)
    #: The text that became certain with each token.
    texts: list[str] = field(default_factory=list)
    #: Of each token, where they were asked for; else none.
    logprobs: list[TokenLogprob] = field(default_factory=list)
    #: Of each prompt token so far, where they were asked for; else none.
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    #: True once the last chunk was handed out.
    closed: bool = False
    handed_out: int = 0
    prefilled: bool = False
    #: When the caller came with it, when its newest token was there, and the backend's model seconds then.
    submitted: float = 0.0
    newest: float = 0.0
    newest_model_s: float = 0.0
    queue_s: float = 0.0
    ttft_s: float = 0.0
    prefill_model_s: float = 0.0
    itl_s: list[float] = field(default_factory=list)
    host_s: list[float] = field(default_factory=list)
    #: Tokens of drafts that were verified, and how many of them were taken.
    drafted: int = 0
    accepted: int = 0

    @property
    def needs_logits(self) -> bool:
        """Whether the host must see the logits: to draw a token, or to report log-probabilities."""
        return self.sample is not None or self.top_logprobs is not None

    def cached_ids(self) -> tuple[int, ...]:
        """Ids that the row's cache surely holds. The newest token is not among them: decoding it writes it."""
        if not self.prefilled:
            return self.prompt[: self.reused]
        return self.prompt + tuple(self.tokens[:-1])

    def result(self) -> GenerationResult:
        """The answer so far; "interrupted" where it had not come to its end."""
        count = len(self.tokens)
        return GenerationResult(
            text="".join(self.texts[:count]),
            tokens=tuple(self.tokens),
            finish_reason=self.finish_reason or "interrupted",
            logprobs=None if self.top_logprobs is None else tuple(self.logprobs[:count]),
            prompt_tokens=self.prompt,
            timings=self.timings(),
            prompt_logprobs=None if self.top_prompt_logprobs is None else tuple(self.prompt_logprobs),
        )

    def timings(self) -> Timings:
        """Timings so far."""
        return Timings(
            prompt_tokens=len(self.prompt),
            new_tokens=len(self.tokens),
            reused_tokens=self.reused,
            ttft_s=self.ttft_s,
            prefill_model_s=self.prefill_model_s,
            itl_s=tuple(self.itl_s),
            host_s=tuple(self.host_s),
            queue_s=self.queue_s,
            drafted_tokens=self.drafted,
            accepted_tokens=self.accepted,
        )


def make_sequence(
    prompt: tuple[int, ...],
    params: SamplingParams,
    tokenizer: Tokenizer,
    *,
    eos: tuple[int, ...],
    vocab_size: int,
    max_seq: int,
    reused: int = 0,
    reply: bool = False,
    encode_s: float = 0.0,
    on_device: Callable[[DeviceChoice], bool] | None = None,
    processors: Sequence[LogitsProcessor] = (),
    grammar: GrammarState | None = None,
) -> GenerationSequence:
    """A sequence ready to run. Its last token needs no cache position: prompt and answer may be one token longer.

    `reply`: its text is one of its own, without the space that would continue the prompt. `on_device`: which
    choices the backend makes itself, the same ones as the host. `processors` come after those that `params` ask for,
    and after them `grammar`, the beginning of an answer under the grammar of `params`.
    Raises SamplingError for tokens in `params` that the model does not have.
    """
    stop_ids = frozenset(params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, *eos))
    processors = [
        *logits_processors(params, prompt, tokenizer, end_ids=sorted(stop_ids), vocab_size=vocab_size),
        *processors,
        *([grammar] if grammar is not None else ()),
    ]
    drawn = device_choice(params) if on_device is not None and not processors else None
    if drawn is not None and on_device is not None and not on_device(drawn):
        drawn = None
    as_chosen = drawn is not None or (params.temperature == 0 and not processors)
    return GenerationSequence(
        prompt=prompt,
        reused=reused,
        limit=min(params.max_tokens, max_seq + 1 - len(prompt)),
        top_logprobs=params.logprobs,
        stop_ids=stop_ids,
        sample=None if as_chosen else make_sampler(params, processors),
        detokenizer=tokenizer.detokenizer(() if reply else prompt, params.shown_tokens),
        stops=StopMatcher(params.stop) if params.stop else None,
        min_tokens=params.min_tokens,
        grammar=grammar,
        encode_s=encode_s,
        top_prompt_logprobs=params.prompt_logprobs,
        choice=drawn or GREEDY,
    )


def score_prompt(sequence: GenerationSequence, output: StepOutput, first: int, count: int) -> None:
    """Take the log-probabilities of the prompt's tokens that a run over tokens first..first+count says something of.

    Those are the ones after each of them, as far as the prompt has them. Raises BackendError where one is no number.
    """
    if first == 0:
        sequence.prompt_logprobs.append(None)
    following = sequence.prompt[first + 1 : first + count + 1]
    sequence.prompt_logprobs += token_logprobs(output, following, sequence.top_prompt_logprobs or 0)


def token_logprobs(output: StepOutput, tokens: Sequence[int], top_n: int) -> list[TokenLogprob]:
    """Log-probabilities of `tokens`: token j after row j of the output. Raises BackendError where one is no number."""
    if -1 in output.tokens()[: len(tokens)]:
        check_finite(math.nan)
    return [logprobs(logits, token, top_n) for logits, token in zip(output.logits(), tokens, strict=False)]


def append_token(
    sequence: GenerationSequence, token: int, logits: Logits | None, *, model_s: float, idle_s: float
) -> GenerationChunk:
    """Take the backend's choice `token`, or choose one from logits [vocab]; the chunk that it makes.

    `logits` may be None where the sequence needs none. Whether the token ends the sequence is decided here, and its
    time is booked: `model_s` is the backend's model seconds, `idle_s` what the clock counts too much. The last chunk
    carries the reason and the timings.
    """
    logprob = None
    if logits is not None and sequence.needs_logits:
        if sequence.sample is not None:
            token = sequence.sample(logits)
        if sequence.top_logprobs is not None:
            logprob = logprobs(logits, token, sequence.top_logprobs)
            sequence.logprobs.append(logprob)
    text, reason, count = "", None, len(sequence.tokens)
    if token in sequence.stop_ids:
        reason = _STOP
    else:
        text = sequence.detokenizer.push(token)
        if sequence.stops is not None and count >= sequence.min_tokens:
            text, stopped = sequence.stops.push(text)
            reason = _STOP if stopped else None
        if reason is None and sequence.grammar is not None and sequence.grammar.complete:
            reason = _STOP
        if reason is None and count + 1 >= sequence.limit:
            reason = _LENGTH
    if reason is not None:
        text, reason = _with_held_back(sequence, text, reason)
    sequence.texts.append(text)
    sequence.tokens.append(token)
    sequence.finish_reason = reason
    now = perf_counter() - idle_s
    if count:
        gap = now - sequence.newest
        sequence.itl_s.append(gap)
        sequence.host_s.append(gap - (model_s - sequence.newest_model_s))
    else:
        sequence.ttft_s = now - sequence.submitted
    sequence.newest, sequence.newest_model_s, sequence.handed_out = now, model_s, count + 1
    if reason is None:
        return GenerationChunk(text, token, logprob)
    sequence.closed = True
    return GenerationChunk(text, token, logprob, reason, sequence.timings())


def _with_held_back(sequence: GenerationSequence, text: str, reason: FinishReason) -> tuple[str, FinishReason]:
    """The text with what detokenizer and stop matcher still held; it may itself complete a stop string."""
    tail = sequence.detokenizer.flush()
    if sequence.stops is None or len(sequence.tokens) < sequence.min_tokens:
        return text + tail, reason
    tail, stopped = sequence.stops.push(tail)
    return text + tail + sequence.stops.flush(), _STOP if stopped else reason


def interrupted_chunk(sequence: GenerationSequence, reason: FinishReason = "interrupted") -> GenerationChunk:
    """The last chunk of a row that is ended early: text that was held back or not handed out yet."""
    text = "".join(sequence.texts[sequence.handed_out : len(sequence.tokens)])
    text += interrupt(sequence, reason)
    sequence.closed = True
    return GenerationChunk(text, None, None, sequence.finish_reason, sequence.timings())


def interrupt(sequence: GenerationSequence, reason: FinishReason = "interrupted") -> str:
    """End an unfinished sequence where it is; returns the text that was held back, now part of its newest token's."""
    if sequence.finish_reason is not None:
        return ""
    if not sequence.tokens:  # what is held back is the prompt's
        sequence.finish_reason = reason
        return ""
    tail, sequence.finish_reason = _with_held_back(sequence, "", reason)
    sequence.texts[len(sequence.tokens) - 1] += tail
    return tail
