"""What a generation returns: text, tokens, why it ended, and how long each part took."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Literal, NamedTuple

from starling.engine.generation.sampler import TokenLogprob

#: "stop": end token or stop string; "length": max_tokens or the cache's end; "interrupted": Ctrl-C, or closed early.
#: Of a served request also "cancelled", "deadline" (its time was up) and "failed" (see the handle's `result`).
FinishReason = Literal["stop", "length", "interrupted", "cancelled", "deadline", "failed"]


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of one generation, as the engine's own clock saw them: what a consumer does between tokens is left out.

    `itl_s` has one entry per decoded token (all but the first). In a batch a step's time counts for every row in it,
    and `ttft_s` includes the prefill of the rows before.

    Where steps are launched ahead (TensorRT), a step begins with launching the next one and ends with its own token
    taken; `host_s` is then all but the wait for the device, which works on meanwhile: it adds nothing to the latency
    as long as it is shorter than a step of the device.

    Of tokens that one run verified together, the first has the run's time and the others what taking them took.

    Of a served request `ttft_s` and `itl_s` are what its reader waits: the queue, and other requests' prefills between
    two tokens, are part of them.
    """

    prompt_tokens: int
    new_tokens: int
    #: Prompt tokens already in the KV cache from the turn before; `prompt_tokens - reused_tokens` were prefilled.
    reused_tokens: int
    #: From the call to the first token: encoding the prompt, prefill, and choosing the token. Where no token is asked
    #: for, to the end of the prefill.
    ttft_s: float
    #: The prefill's runs of the model alone.
    prefill_model_s: float
    itl_s: tuple[float, ...]
    #: Per decode step, what it took outside the model's run: choosing, detokenizing, stop checks.
    host_s: tuple[float, ...]
    #: Of a served request: from the call to the start of its prefill; part of `ttft_s`.
    queue_s: float = 0.0
    #: With speculation: tokens of drafts that the model verified, and how many of them it would have chosen itself.
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def prefilled_tokens(self) -> int:
        """Prompt tokens that this generation had to prefill."""
        return self.prompt_tokens - self.reused_tokens

    @property
    def acceptance(self) -> float | None:
        """Share of the drafted tokens that were accepted; None without any."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else None

    @property
    def ttft_ms(self) -> float:
        """Time to first token, in ms."""
        return self.ttft_s * 1e3

    @property
    def decode_s(self) -> float:
        """Seconds from the first token to the last."""
        return sum(self.itl_s)

    @property
    def total_s(self) -> float:
        """Request latency: from the call to the last token, in seconds."""
        return self.ttft_s + self.decode_s

    @property
    def model_s(self) -> float:
        """Seconds inside the model's runs."""
        return self.prefill_model_s + self.decode_s - sum(self.host_s)

    @property
    def tpot_ms(self) -> float:
        """Time per output token, in ms: (last - first) / (n - 1). 0 with fewer than two tokens."""
        return self.decode_s / len(self.itl_s) * 1e3 if self.itl_s else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Decode speed of this row: tokens after the first, per second. 0 with fewer than two tokens."""
        return len(self.itl_s) / self.decode_s if self.itl_s else 0.0

    @property
    def host_s_per_token(self) -> float:
        """Seconds of a decode step outside the model's run, the median. 0 with fewer than two tokens."""
        return median(self.host_s) if self.host_s else 0.0


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """One finished generation. `text` ends before a stop string; `tokens` has every token chosen, the end token too."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    #: One entry per token where SamplingParams.logprobs asked for them, else None.
    logprobs: tuple[TokenLogprob, ...] | None
    prompt_tokens: tuple[int, ...]
    timings: Timings
    #: One entry per prompt token where SamplingParams.prompt_logprobs asked for them, else None. The first is None:
    #: nothing comes before it.
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None


class GenerationInterrupted(KeyboardInterrupt):
    """Ctrl-C during `Engine.generate`; `results` has one result per prompt, with the text so far."""

    def __init__(self, results: list[GenerationResult]) -> None:
        super().__init__("generation interrupted")
        self.results = results


# A tuple: to make a dataclass takes 6 µs after a step of the model, where the caches are cold, and this takes 2.
class GenerationChunk(NamedTuple):
    """What one token added to a stream. The texts of all chunks joined are the result's text.

    `text` is often "" while a character or a possible stop string is incomplete. The last chunk has `finish_reason` and
    `timings`; its `token` is None where no token came with it: the stream was interrupted, or max_tokens was 0.
    """

    text: str
    token: int | None
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
    timings: Timings | None = None
