"""Engine, the way in for Python programs: what one thread at a time does with a loaded bundle and its one KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Unpack, cast, overload

from starling.engine.backends.pooling_backend import Vectors
from starling.engine.batching.generation_stream import GenerationStream, generate
from starling.engine.chat_session import ChatSession
from starling.engine.errors import PromptError, SamplingError, UserError, shown
from starling.engine.generation.continuation_scores import ContinuationScore, ContinuationScorer, scored_pair
from starling.engine.generation.prompts import Prompt, checked_ids, common_prefix, is_single
from starling.engine.generation.results import GenerationInterrupted, GenerationResult
from starling.engine.generation.sampling_params import SamplingOverrides, SamplingParams, with_overrides
from starling.engine.generation.sequence import GenerationSequence
from starling.engine.loaded_bundle import LoadedBundle
from starling.engine.pooling.text_pooler import TextInput


class Engine(LoadedBundle):
    """Generates text from a bundle, or scores or embeds texts by one. One thread at a time may use an engine.

    ```python
    with Engine("smollm2-int8") as engine:
        print(engine.generate("The largest city in Japan is", max_tokens=6).text)
    ```
    """

    #: The stream that was begun last, while it may still be read.
    _newest: GenerationStream | None = None
    #: What the first row of the cache holds: that of a generation, or of a scoring.
    _first_row: GenerationSequence | None = None
    _scorer: ContinuationScorer | None = None
    #: Who has the backend for itself, and how to end that.
    _reserved: tuple[object, Callable[[], None]] | None = None

    @overload
    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        reply: bool = False,
        **overrides: Unpack[SamplingOverrides],
    ) -> GenerationResult: ...

    @overload
    def generate(
        self,
        prompt: list[str] | list[list[int]],
        params: SamplingParams | None = None,
        *,
        reply: bool = False,
        **overrides: Unpack[SamplingOverrides],
    ) -> list[GenerationResult]: ...

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        reply: bool = False,
        **overrides: Unpack[SamplingOverrides],
    ) -> GenerationResult | list[GenerationResult]:
        """Generate an answer to a prompt, or to each prompt of a list in one static batch of at most `max_batch`.

        A prompt is text or token ids, which the answer continues: no chat template is applied (see `chat`). `overrides`
        change fields of `params`. With `reply` the text is one of its own, as for a chat, and does not begin with the
        space that would continue the prompt. Raises PromptError or SamplingError, and on Ctrl-C GenerationInterrupted,
        which has the results so far.
        """
        single = is_single(prompt)
        prompts = cast(list[Prompt], [prompt] if single else list(prompt))
        sequences = self._prepare(prompts, with_overrides(params, overrides), reply=reply)
        results = self._finish(sequences)
        return results[0] if single else results

    def generate_choices(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        n: int,
        reply: bool = False,
        **overrides: Unpack[SamplingOverrides],
    ) -> list[GenerationResult]:
        """`n` answers to one prompt, at most `max_batch`; the i-th has the seed plus i where `params` have one.

        The prompt is prefilled once where the backend copies rows (ONNX Runtime on a CPU). Otherwise as `generate`.
        """
        if n < 1:
            raise SamplingError(f"n is {shown(n)}: give 1 or more", field="n")
        chosen, ids = with_overrides(params, overrides), self.encode(prompt) if isinstance(prompt, str) else prompt
        self._check_rows(n, "answers")
        return self._finish(
            [self.prepare(ids, chosen.of_choice(index), reply=reply) for index in range(n)], one_prompt=True
        )

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **overrides: Unpack[SamplingOverrides]
    ) -> GenerationStream:
        """Generate an answer as an iterator of chunks, one for each token.

        Raises PromptError or SamplingError here already, not when the first chunk is read.
        """
        [sequence] = self._prepare([prompt], with_overrides(params, overrides))
        return self._start([sequence])

    def stream_reply(
        self,
        ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        encode_s: float = 0.0,
        **overrides: Unpack[SamplingOverrides],
    ) -> GenerationStream:
        """`stream` for a chat's token ids: only what is not in the first row's cache yet is prefilled.

        The text is a reply of its own, so it does not begin with the space that would continue the prompt.
        `encode_s` are the seconds that rendering the chat took, for the time to first token.
        """
        prompt = checked_ids(ids, self.bundle, self.max_seq)
        self._end_newest()
        cached = self._first_row.cached_ids() if self._first_row is not None else ()
        chosen = with_overrides(params, overrides)
        # The last prompt token is always prefilled, for its logits.
        reused = min(common_prefix(cached, prompt), len(prompt) - 1) if chosen.prompt_logprobs is None else 0
        return self._start([self._sequence(prompt, chosen, reused=reused, reply=True, encode_s=encode_s)])

    def score(self, prompt: Prompt, continuations: Sequence[Prompt], *, logprobs: int = 0) -> list[ContinuationScore]:
        """How likely each continuation is after the prompt, token by token; the prompt is prefilled once.

        A text is continued by texts (a space between the two begins the continuation), whose tokens are those of both
        texts together as far as they are not the prompt's; token ids by ids. `logprobs` of the likeliest tokens are
        reported beside each token. What the prompt has in common with the one scored before is not prefilled again.
        Raises PromptError, and BackendError where the graph gives the last token's logits only.
        """
        self.backend.check_scores()
        pairs = [
            scored_pair(prompt, each, f"continuations[{i}]", self.encode, self.bundle, self.max_seq)
            for i, each in enumerate(continuations)
        ]
        scorer = self._scorer or ContinuationScorer(self.backend)
        self._take_cache()
        scores = [scorer.score(*pair, logprobs) for pair in pairs]
        self._scorer = scorer  # not where a run failed: nobody knows then what the row holds
        return scores

    def chat(self, system: str | None = None, template: str | None = None) -> ChatSession:
        """A multi-turn chat with an optional system message, by the bundle's template or the one named `template`."""
        return ChatSession(self, system=system, template=template)

    def score_texts(
        self, texts: Sequence[TextInput], *, template: str | None = None, truncate: int | None = None
    ) -> Vectors:
        """Raw scores float32 [texts, labels] of texts, of chats (lists of messages) or of lists of token ids.

        `labels` of `bundle.pooling` names them. `template` is for chats; `truncate` is how many tokens of a text are
        read, -1 for as many as the model takes (default: the bundle's own; where it has none a longer text is refused).
        Raises PromptError for a text that cannot be read, UserError where the bundle is not one that scores.
        """
        self.bundle.require("score")
        self._check_not_reserved()
        return self.pooler.pool_texts(texts, template=template, truncate=truncate)

    def embed_texts(
        self, texts: Sequence[TextInput], *, template: str | None = None, truncate: int | None = None
    ) -> Vectors:
        """A vector each, float32 [texts, hidden], of texts, chats or token ids, not normalized.

        It is the last token's hidden state, or the mean over all tokens, as `bundle.pooling.read_at` says.

        Arguments and errors are those of `score_texts`; the bundle is one that was exported with `--task embed`.
        """
        self.bundle.require("embed")
        self._check_not_reserved()
        return self.pooler.pool_texts(texts, template=template, truncate=truncate)

    def reserve(self, user: object, end: Callable[[], None]) -> None:
        """Reserve the backend for one user until `release`: generating here raises UserError meanwhile.

        `close` calls `end`, which must end that use. Raises UserError where the engine is reserved already.
        """
        self._take_cache()
        self._reserved = (user, end)

    def release(self, user: object) -> None:
        """End a reservation; nothing happens where it is not this user's."""
        if self._reserved is not None and self._reserved[0] is user:
            self._reserved = None

    def close(self) -> None:
        """Free the model and the KV cache."""
        if self._reserved is not None:
            self._reserved[1]()
        self._end_newest()
        super().close()

    def _prepare(
        self, prompts: Sequence[Prompt], params: SamplingParams, *, reply: bool = False
    ) -> list[GenerationSequence]:
        self._check_rows(len(prompts), "prompts")
        return [self.prepare(prompt, params, reply=reply) for prompt in prompts]

    def _check_rows(self, count: int, what: str) -> None:
        if count > self.max_batch:
            raise PromptError(
                f"{count} {what}, but the KV cache has {self.max_batch} row(s): "
                "give fewer, or open the engine with a larger max_batch"
            )

    def _finish(self, sequences: list[GenerationSequence], *, one_prompt: bool = False) -> list[GenerationResult]:
        """Run the sequences to their ends. Raises GenerationInterrupted where Ctrl-C was first."""
        for _ in self._start(sequences, one_prompt=one_prompt):
            pass
        results = [sequence.result() for sequence in sequences]
        if any(result.finish_reason == "interrupted" for result in results):
            raise GenerationInterrupted(results)
        return results

    def _start(self, sequences: list[GenerationSequence], *, one_prompt: bool = False) -> GenerationStream:
        self._take_cache()
        self._first_row = sequences[0]
        chunks = generate(self.backend, sequences, self._speculation, one_prompt=one_prompt, draft=self.draft)
        self._newest = GenerationStream(chunks, sequences)
        return self._newest

    def _take_cache(self) -> None:
        """Whoever calls writes to the cache next: a stream that is still being read ends, and what is known is void."""
        self._check_not_reserved()
        self._end_newest()
        self._first_row = self._scorer = None

    def _check_not_reserved(self) -> None:
        if self._reserved is not None:
            raise UserError("this engine is in use by a serving loop: submit to that, or close it first")

    def _end_newest(self) -> None:
        # There is one cache: a stream that is still being read would continue on another prompt's keys and values.
        if self._newest is not None:
            self._newest.displace()
            self._newest = None
