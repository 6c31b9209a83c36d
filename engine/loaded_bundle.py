"""A bundle loaded on a backend, with its tokenizer: what any thread may ask of it, while one thread runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

from starling.engine.backends.backend import Backend
from starling.engine.backends.open_backend import open_backend, open_pooling_backend
from starling.engine.backends.pooling_backend import PoolingBackend
from starling.engine.batching.draft_model import DraftModel
from starling.engine.batching.speculation import checked_speculation
from starling.engine.bundle.manifest import Bundle
from starling.engine.draft_bundle import open_draft
from starling.engine.errors import BackendError, PromptError, SamplingError
from starling.engine.generation.logits_processors import LogitsProcessor
from starling.engine.generation.prompts import Prompt, checked_ids
from starling.engine.generation.sampling_params import SamplingParams
from starling.engine.generation.sequence import GenerationSequence, make_sequence
from starling.engine.names import DEFAULT_MAX_SEQ, DType, Speculation
from starling.engine.pooling.text_pooler import TextPooler
from starling.engine.text.grammar_compiler import Grammars
from starling.engine.text.grammar_state import GrammarState
from starling.engine.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from starling.engine.text.chat_template import ChatTemplates


class LoadedBundle:
    """Opens all that a bundle needs, makes token ids and sequences, and frees it all; nothing here runs the model."""

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
        self.bundle = opened.with_kv_dtype(kv_dtype)
        self.max_seq = _checked_max_seq(self.bundle, max_seq)
        self.max_batch = max_batch
        #: What drafts, where a bundle for that is open.
        self.draft: DraftModel | None = None
        self._speculation: Speculation | None = None
        sizes = {"max_seq": self.max_seq, "max_batch": max_batch}
        with ExitStack() as closing, ThreadPoolExecutor(1) as pool:
            # ONNX Runtime loads without holding Python's lock: the tokenizer's 0.1 s cost nothing beside it.
            tokenizer = pool.submit(Tokenizer.load, self.bundle.folder, self.bundle.architecture.vocab_size)
            #: What runs the bundle, whatever it is for.
            self.model: Backend | PoolingBackend
            if self.bundle.task == "generate":
                self.model = open_backend(
                    self.bundle, name=backend, engine=engine, threads=threads, takes_turns=draft is not None, **sizes
                )
            else:
                self.model = open_pooling_backend(self.bundle, name=backend, threads=threads, **sizes)
            closing.callback(lambda: self.model.close())
            self.tokenizer = tokenizer.result()
            self._grammars = Grammars(self.tokenizer, self.bundle.tokens.eos, self.bundle.architecture.vocab_size)
            if draft is not None:
                self.backend.check_verifies()
                self.draft = open_draft(draft, self.bundle, self.tokenizer, backend=backend, threads=threads, **sizes)
                closing.callback(self.draft.backend.close)
                speculation = speculation or "draft-model"
            if speculation is not None:
                self.speculation = speculation
            self._closing = closing.pop_all()
        #: Seconds from opening the bundle to being ready.
        self.load_seconds = perf_counter() - begin

    @property
    def backend(self) -> Backend:
        """What generates. Raises UserError where the bundle scores or embeds texts."""
        if self.bundle.task != "generate":
            self.bundle.require("generate")
        return cast(Backend, self.model)

    @backend.setter
    def backend(self, backend: Backend) -> None:
        self.model = backend

    @cached_property
    def pooler(self) -> TextPooler:
        """What scores or embeds. Raises UserError where the bundle generates text."""
        self.bundle.require("score", "embed")
        return TextPooler(self.bundle, cast(PoolingBackend, self.model), self.tokenizer, lambda: self.chat_templates)

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
        return self.backend.kv_cache_bytes if self.bundle.task == "generate" else 0

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

    def close(self) -> None:
        """Free the model and the KV cache."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

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


def _checked_max_seq(bundle: Bundle, max_seq: int | None) -> int:
    most = bundle.architecture.max_positions
    if max_seq is None:  # what scores takes memory for as many tokens as a text has
        return min(DEFAULT_MAX_SEQ, most) if bundle.task == "generate" else most
    if not 1 <= max_seq <= most:
        problem, remedy = f"max_seq is {max_seq}, but this model has {most} positions", f"give 1 to {most} (--max-seq)"
        raise PromptError(problem, detail=remedy, field="max_seq")
    return max_seq
