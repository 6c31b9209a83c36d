"""Engine: a bundle loaded on a backend, with its tokenizer; the way in for Python programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from threading import Thread
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, Unpack, cast, overload

import numpy as np

from starling.engine.backends.backend import Backend
from starling.engine.backends.open_backend import open_backend, open_pooling_backend
from starling.engine.backends.pooling_backend import PoolingBackend, Vectors
from starling.engine.batching.draft_model import DraftModel
from starling.engine.batching.generation_stream import GenerationStream, generate
from starling.engine.batching.speculation import checked_speculation
from starling.engine.bundle.kv_dtype import with_kv_dtype
from starling.engine.bundle.manifest import Bundle
from starling.engine.chat_session import ChatSession
from starling.engine.draft_bundle import open_draft
from starling.engine.errors import BackendError, PromptError, SamplingError, UserError, did_you_mean, shown
from starling.engine.generation.continuation_scores import ContinuationScore, ContinuationScorer, scored_pair
from starling.engine.generation.logits_processors import LogitsProcessor
from starling.engine.generation.prompts import Prompt, checked_ids, common_prefix, is_single
from starling.engine.generation.results import GenerationInterrupted, GenerationResult
from starling.engine.generation.sampling_params import SamplingOverrides, SamplingParams
from starling.engine.generation.sequence import GenerationSequence, make_sequence
from starling.engine.names import DEFAULT_MAX_SEQ, DType, Speculation
from starling.engine.pooling.text_pooler import TextInput, TextPooler
from starling.engine.text.grammar_compiler import Grammars
from starling.engine.text.grammar_state import GrammarState
from starling.engine.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from starling.engine.text.chat_template import ChatTemplates

T = TypeVar("T")


class Engine:
    """Generates text from a bundle, or scores or embeds texts by one. One thread at a time may use an engine.

    ```python
    with Engine("smollm2-int8") as engine:
        print(engine.generate("The largest city in Japan is", max_tokens=6).text)
    ```
    """

    def __init__(
        self,
        bundle: str | Path | Bundle,
        *,
        backend: str = "auto",
        engine: str | None = None,
        max_seq: int | None = None,
        max_batch: int = 1,
        threads: int | None = None,
        kv_dtype: DType | None = None,
        verify: bool = False,
        speculation: str | None = None,
        draft: str | Path | Bundle | None = None,
    ) -> None:
        """Load a bundle. The KV cache gets `max_batch` rows of `max_seq` positions (default: 2048 or the model's).

        One that scores or embeds texts takes up to `max_batch` of them in a run, of `max_seq` tokens at most (default:
        the model's), and keeps no cache.

        `backend` is one of `starling.engine.names.BACKENDS`, `engine` names one of the bundle's TensorRT engines;
        `kv_dtype` ("fp32", "fp16", "bf16") is another type for the KV cache than the bundle's own, as `with_kv_dtype`
        says; `verify` hashes the weights too; for `speculation` see the property. `draft` is the bundle of a smaller
        model of the same tokenizer, which drafts for it, with a KV cache of its own on the same `backend`. Raises
        BundleError, BackendError, PlanError where no TensorRT engine fits, PromptError where `max_seq` is beyond the
        model's positions, or UserError where `draft` has another vocabulary or fewer positions, or the cache cannot
        have that type.
        """
        begin = perf_counter()
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, verify=verify)
        self.bundle = with_kv_dtype(opened, kv_dtype)
        self.max_seq = _checked_max_seq(self.bundle, max_seq)
        self.max_batch = max_batch
        self._backend: Backend | None = None
        #: What drafts, where a bundle for that is open.
        self.draft: DraftModel | None = None
        self._pooler: TextPooler | None = None
        vocab_size = self.bundle.architecture.vocab_size
        # ONNX Runtime loads without holding Python's lock: the tokenizer's 0.1 s cost nothing beside it.
        tokenizer = in_background(lambda: Tokenizer.load(self.bundle.folder, vocab_size))
        model: Backend | PoolingBackend
        sizes = {"max_seq": self.max_seq, "max_batch": max_batch}
        if self.bundle.task == "generate":
            model = self._backend = open_backend(self.bundle, name=backend, engine=engine, threads=threads, **sizes)
        else:
            model = open_pooling_backend(self.bundle, name=backend, threads=threads, **sizes)
        #: What runs the bundle, whatever it is for.
        self.model = model
        try:
            self.tokenizer = tokenizer()
            self._grammars = Grammars(self.tokenizer, self.bundle.tokens.eos, vocab_size)
            if self._backend is None:
                pooling = cast(PoolingBackend, model)
                self._pooler = TextPooler(self.bundle, pooling, self.tokenizer, lambda: self.chat_templates)
            if draft is not None:
                self.backend.check_verifies()
                self.draft = open_draft(draft, self.bundle, self.tokenizer, backend=backend, threads=threads, **sizes)
                speculation = speculation or "draft-model"
            self._speculation: Speculation | None = None
            if speculation is not None:
                self.speculation = speculation
        except BaseException:
            model.close()
            if self.draft is not None:
                self.draft.backend.close()
            raise
        self._newest: GenerationStream | None = None
        self._first_row: GenerationSequence | None = None
        self._scorer = None if self._backend is None else ContinuationScorer(self._backend)
        #: Who has the backend for itself, and how to end that.
        self._reserved: tuple[object, Callable[[], None]] | None = None
        #: Seconds from opening the bundle to being ready.
        self.load_seconds = perf_counter() - begin

    @property
    def backend(self) -> Backend:
        """What generates. Raises UserError where the bundle scores or embeds texts."""
        if self._backend is None:
            self.bundle.require("generate")
        return cast(Backend, self._backend)

    @backend.setter
    def backend(self, backend: Backend) -> None:
        self._backend = self.model = backend

    @property
    def pooler(self) -> TextPooler:
        """What scores or embeds. Raises UserError where the bundle generates text."""
        if self._pooler is None:
            self.bundle.require("score", "embed")
        return cast(TextPooler, self._pooler)

    @property
    def speculation(self) -> str | None:
        """Where drafts come from that the model verifies several tokens at a time: "prompt-lookup", "draft-model" (what
        an engine with a `draft` begins with), or None (off).

        The tokens are the same. Several rows are verified together where the CPU kernels run the bundle, elsewhere one
        row while it decodes alone; a serving loop takes it over as it is at the loop's beginning. Setting
        it raises UserError for an unknown name, BackendError where backend or bundle cannot verify drafts.
        """
        return self._speculation

    @speculation.setter
    def speculation(self, name: str | None) -> None:
        self._speculation = checked_speculation(name, self.backend, has_draft=self.draft is not None)

    @property
    def kv_cache_bytes(self) -> int:
        """Memory of the whole KV cache, in bytes; 0 where the bundle scores or embeds, which takes it for each run."""
        return 0 if self._backend is None else self._backend.kv_cache_bytes

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
        sequences = self._prepare(prompts, sampling_params(params, overrides), reply=reply)
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
        chosen, ids = sampling_params(params, overrides), self.encode(prompt) if isinstance(prompt, str) else prompt
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
        [sequence] = self._prepare([prompt], sampling_params(params, overrides))
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
        chosen = sampling_params(params, overrides)
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
        self._check_not_reserved()
        self._end_newest()
        self._first_row = None
        assert self._scorer is not None  # the backend has answered
        try:
            return [self._scorer.score(*pair, logprobs) for pair in pairs]
        except BaseException:
            self._scorer.forget()
            raise

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
        return self._pool(texts, template, truncate)

    def embed_texts(
        self, texts: Sequence[TextInput], *, template: str | None = None, truncate: int | None = None
    ) -> Vectors:
        """A vector each, float32 [texts, hidden], of texts, chats or token ids, not normalized.

        It is the last token's hidden state, or the mean over all tokens, as `bundle.pooling.read_at` says.

        Arguments and errors are those of `score_texts`; the bundle is one that was exported with `--task embed`.
        """
        self.bundle.require("embed")
        return self._pool(texts, template, truncate)

    def _pool(self, texts: Sequence[TextInput], template: str | None, truncate: int | None) -> Vectors:
        self._check_not_reserved()
        if isinstance(texts, str) or (len(texts) and not isinstance(texts[0], str | Sequence | np.ndarray)):
            raise PromptError("one text alone is given", detail="give a list of texts")
        pooler = self.pooler
        return pooler.pool([pooler.prepare(text, template=template, truncate=truncate) for text in texts])

    def encode(self, text: str, *, limit: int | None = None) -> list[int]:
        """Token ids of a prompt, with what the checkpoint puts around it (BOS).

        Raises PromptError for an empty text, and before any work for one that `limit` tokens (default: `max_seq`)
        cannot hold. It lets other threads run meanwhile.
        """
        if not text:
            raise PromptError("the prompt is empty", detail="give it at least one character")
        self.tokenizer.check_fits(len(text), limit or self.max_seq)
        return self.tokenizer.encode(text)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, str]],
        template: str | None = None,
        *,
        limit: int | None = None,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Token ids of `messages` ({"role", "content"}) up to where the assistant's answer begins.

        `tools` are functions in OpenAI's form, for templates that know them; calls of theirs are `tool_calls` of an
        assistant's message, results messages with the role "tool".
        `variables` are handed to the template by their names: JSON values, `{"enable_thinking": False}` for example.
        Raises PromptError where the bundle has no such template, the template refuses the messages, a variable may not
        be given, or they are longer than `limit` tokens can hold, as `encode` does.
        """
        return self.chat_templates.encode(
            messages,
            self.tokenizer,
            name=template,
            add_generation_prompt=True,
            limit=limit or self.max_seq,
            client_variables=variables,
            tools=tools,
        )

    @cached_property
    def chat_templates(self) -> ChatTemplates:
        """The bundle's chat templates."""
        from starling.engine.text.chat_template import ChatTemplates  # a program that never chats starts no process

        return ChatTemplates.load(self.bundle.folder)

    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        reply: bool = False,
        processors: Sequence[LogitsProcessor] = (),
    ) -> GenerationSequence:
        """A sequence ready to run; any thread may ask for one. Raises PromptError or SamplingError.

        `processors` are this sequence's own, after those of `params`.
        """
        begin = perf_counter()
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
        checked = checked_ids(ids, self.bundle, self.max_seq)
        return self._sequence(checked, params, reply=reply, encode_s=perf_counter() - begin, processors=processors)

    def reserve(self, user: object, end: Callable[[], None]) -> None:
        """Reserve the backend for one user until `release`: generating here raises UserError meanwhile.

        `close` calls `end`, which must end that use. Raises UserError where the engine is reserved already.
        """
        self._check_not_reserved()
        self._end_newest()
        if self._scorer is not None:
            self._scorer.forget()
        self._first_row = None
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
        self._first_row = None
        self.model.close()
        if self.draft is not None:
            self.draft.backend.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

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

    def _sequence(
        self,
        prompt: tuple[int, ...],
        params: SamplingParams,
        *,
        reused: int = 0,
        reply: bool,
        encode_s: float,
        processors: Sequence[LogitsProcessor] = (),
    ) -> GenerationSequence:
        if params.prompt_logprobs is not None:
            self._check_scores()
        return make_sequence(
            prompt,
            params,
            self.tokenizer,
            eos=self.bundle.tokens.eos,
            vocab_size=self.bundle.architecture.vocab_size,
            max_seq=self.max_seq,
            reused=reused,
            reply=reply,
            encode_s=encode_s,
            on_device=None if self.backend.steps_ahead is None else self.backend.steps_ahead.can_choose,
            processors=processors,
            grammar=self._grammar(params, reply=reply),
        )

    def _grammar(self, params: SamplingParams, *, reply: bool) -> GrammarState | None:
        if params.grammar is None:
            return None
        return self._grammars.start(
            params.grammar,
            end_ids=params.stop_token_ids,
            ends=not params.ignore_eos,
            after_space=reply and self.tokenizer.strips_first_space,
        )

    def _check_scores(self) -> None:
        try:
            self.backend.check_scores()
        except BackendError as error:
            raise SamplingError(f"prompt_logprobs cannot be had: {error}", field="prompt_logprobs") from error

    def _start(self, sequences: list[GenerationSequence], *, one_prompt: bool = False) -> GenerationStream:
        self._check_not_reserved()
        self._end_newest()
        if self._scorer is not None:
            self._scorer.forget()
        self._first_row = sequences[0]
        chunks = generate(self.backend, sequences, self._speculation, one_prompt=one_prompt, draft=self.draft)
        self._newest = GenerationStream(chunks, sequences)
        return self._newest

    def _check_not_reserved(self) -> None:
        if self._reserved is not None:
            raise UserError("this engine is in use by a serving loop: submit to that, or close it first")

    def _end_newest(self) -> None:
        # There is one cache: a stream that is still being read would continue on another prompt's keys and values.
        if self._newest is not None:
            self._newest.displace()
            self._newest = None


def sampling_params(params: SamplingParams | None, overrides: Mapping[str, Any]) -> SamplingParams:
    """`params`, or the defaults, with `overrides` in place. Raises SamplingError for an unknown name or a bad value."""
    known = [field.name for field in fields(SamplingParams)]
    for name in overrides:
        if name not in known:
            near = did_you_mean(name, known)
            problem = f"unknown sampling setting {name!r}{near}; the settings are {', '.join(known)}"
            raise SamplingError(problem, field=name)
    return replace(params or SamplingParams(), **overrides)


def in_background(task: Callable[[], T]) -> Callable[[], T]:
    """Start `task` on a thread; the function returned waits for its result, or raises what it raised."""
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(task())
        except BaseException as error:
            errors.append(error)

    thread = Thread(target=work)
    thread.start()

    def wait() -> T:
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    return wait


def _checked_max_seq(bundle: Bundle, max_seq: int | None) -> int:
    most = bundle.architecture.max_positions
    if max_seq is None:  # what scores takes memory for as many tokens as a text has
        return min(DEFAULT_MAX_SEQ, most) if bundle.task == "generate" else most
    if not 1 <= max_seq <= most:
        problem, remedy = f"max_seq is {max_seq}, but this model has {most} positions", f"give 1 to {most} (--max-seq)"
        raise PromptError(problem, detail=remedy, field="max_seq")
    return max_seq
