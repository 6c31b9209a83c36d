"""One model behind the HTTP endpoints: it takes requests in, refuses them when the queue is full, and ends them all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

from starling.engine.batching.request import RequestHandle
from starling.engine.engine import Engine
from starling.engine.errors import StarlingError
from starling.engine.serving_loop import ServingLoop
from starling.serving.api.api_errors import ApiError, bad_field, from_engine, shutting_down
from starling.serving.api.prompt_echo import PromptEcho, prompt_echo
from starling.serving.api.token_texts import TokenTexts
from starling.serving.api.tool_fields import settings_with_tools
from starling.serving.http.request_bodies import ApiRequest, Limits
from starling.serving.metrics.prometheus import PrometheusMetrics

T = TypeVar("T")

#: Threads that read requests. They take turns with the event loop's: the fewer, the sooner it has its own.
WORKERS = 2


@dataclass(frozen=True, slots=True)
class Submitted:
    """A request whose generations are queued: `request.candidates` of the first prompt, then those of the next."""

    request: ApiRequest
    handles: list[RequestHandle]
    #: Of each prompt, where the answer repeats it; else none.
    echoes: list[PromptEcho]


class Service:
    """An engine, its loop, and the requests that run on it."""

    def __init__(self, engine: Engine, loop: ServingLoop, limits: Limits) -> None:
        self.engine, self.limits = engine, limits
        self.texts = TokenTexts(engine.tokenizer)
        self.metrics = PrometheusMetrics(limits.models[0], loop.stats)
        #: True once the server ends: what runs is finished, nothing new begins.
        self.draining = False
        self.loop = loop
        self._running: set[RequestHandle] = set()
        self._settling: set[asyncio.Task[None]] = set()
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="starling-request")
        engine.chat_templates  # noqa: B018 (a template that is none ends the start, not the first chat)

    @property
    def failed(self) -> bool:
        """Whether the serving loop has ended by a failure: nothing is answered until the process starts anew."""
        return self.loop.failure is not None

    async def start(self, read: Callable[[], ApiRequest], request_id: str) -> Submitted:
        """Read a request and queue it, under the id of its HTTP request; a handle for each candidate of each prompt.

        All that takes the longer the longer the request is (JSON, template, tokenizer) runs on a worker; streams go on
        meanwhile. Raises ApiError: what `read` raises, 400 for a bad prompt, 429 where the queue is full, 503 at the
        end.
        """
        if self.draining:
            raise shutting_down()
        handles: list[RequestHandle] = []
        try:
            submitted = await self.work(lambda: self._read_and_submit(read, request_id, handles))
        except ApiError:
            for handle in handles:  # those before the one that was refused
                self.finish(handle, recorded=False)
            raise
        self._running.update(handles)
        return submitted

    async def work(self, task: Callable[[], T]) -> T:
        """What a task returns that takes long, for the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, task)

    def finish(self, handle: RequestHandle, *, recorded: bool) -> None:
        """Forget a request whose end its reader has `recorded`; another one is cancelled, and recorded when it ends."""
        handle.cancel()
        if recorded:
            self._running.discard(handle)
        else:
            settling = asyncio.create_task(self._settle(handle))
            self._settling.add(settling)  # the event loop alone would let go of it
            settling.add_done_callback(self._settling.discard)

    async def _settle(self, handle: RequestHandle) -> None:
        await handle.settled()
        self._running.discard(handle)
        self.metrics.record(handle.partial.timings)

    def cancel_all(self) -> None:
        """End every request where it is."""
        for handle in tuple(self._running):
            handle.cancel()

    def close(self) -> None:
        """End the workers; what they have not begun is dropped."""
        self._workers.shutdown(wait=False, cancel_futures=True)

    def _read_and_submit(
        self, read: Callable[[], ApiRequest], request_id: str, handles: list[RequestHandle]
    ) -> Submitted:
        """The request, whose generations are submitted and put into `handles` one after the other."""
        request = read()
        if request.params.prompt_logprobs is not None and self.engine.backend.most_scored == 0:
            field = "echo" if request.prompt_logprobs is None else "prompt_logprobs"
            what = "echo with logprobs" if field == "echo" else field
            problem = f"{what}: this server has the log-probabilities of answers only; leave it out"
            raise bad_field(field, problem, "unsupported_parameter")
        try:
            request = self._with_tools(request)
            encoded, tokenizer = self._encoded(request), self.engine.tokenizer
            pairs = zip(request.prompts, encoded, strict=True) if request.echo else ()
            echoes = [prompt_echo(tokenizer, self.texts, prompt, ids) for prompt, ids in pairs]
            for ids in encoded:  # all of them are known, before one is submitted
                self._submit(request, ids, request_id, handles)
        except StarlingError as error:
            raise from_engine(error, request.prompt_field) from None
        return Submitted(request, handles, echoes)

    def _with_tools(self, request: ApiRequest) -> ApiRequest:
        """The request with what its tools ask of the answer."""
        if request.tools is None:
            return request
        template = self.engine.chat_templates.source(request.template)
        if template is None:  # as encoding will say
            return request
        special = self.engine.tokenizer.special_ids_by_text
        params, known = settings_with_tools(request.params, request.tools, template, special)
        return replace(request, params=params, tool_format=known)

    def _submit(self, request: ApiRequest, ids: list[int], request_id: str, handles: list[RequestHandle]) -> None:
        names = [f"{request_id}-{len(handles) + candidate}" for candidate in range(request.candidates)]
        handles += self.loop.submit_choices(
            ids,
            request.candidate_params,
            request.candidates,
            deadline_s=request.deadline_s,
            reply=request.messages is not None,
            request_ids=[request_id] if request.generations == 1 else names,
            cache_salt=request.cache_salt,
            priority=request.priority,
            owner=request.owner,
        )

    def _encoded(self, request: ApiRequest) -> list[list[int]]:
        """The prompts' token ids, none longer than the server takes."""
        limit = self.limits.max_prompt
        if request.messages is not None:
            encoded = [
                self.engine.apply_chat_template(
                    request.messages,
                    request.template,
                    limit=limit,
                    variables=request.variables,
                    tools=None if request.tools is None else request.tools.tools,
                )
            ]
        else:
            encoded = [
                self.engine.encode(prompt, limit=limit) if isinstance(prompt, str) else prompt
                for prompt in request.prompts
            ]
        for ids in encoded:
            if len(ids) > limit:
                raise bad_field(
                    request.prompt_field,
                    f"the prompt has {len(ids)} tokens, but this server takes {limit}: shorten it",
                    "context_length_exceeded",
                )
        return encoded
