"""One model behind the HTTP endpoints: it takes requests in, refuses them when the queue is full, and ends them all."""

from __future__ import annotations

import asyncio

from starling.engine.batching.request import RequestHandle
from starling.engine.engine import Engine
from starling.engine.errors import StarlingError
from starling.engine.serving_loop import ServingLoop
from starling.serving.api.api_errors import bad_field, from_engine, shutting_down
from starling.serving.api.token_texts import TokenTexts
from starling.serving.http.request_bodies import ApiRequest, Limits
from starling.serving.metrics.prometheus import PrometheusMetrics


class Service:
    """An engine, its loop, and the requests that run on it."""

    def __init__(self, engine: Engine, loop: ServingLoop, limits: Limits) -> None:
        self.engine, self.limits = engine, limits
        self.texts = TokenTexts(engine.tokenizer)
        self.metrics = PrometheusMetrics(limits.models[0], loop.stats)
        #: True once the server ends: what runs is finished, nothing new begins.
        self.draining = False
        self._loop = loop
        self._running: set[RequestHandle] = set()

    async def start(self, request: ApiRequest, request_id: str) -> RequestHandle:
        """Queue a request, under the id of its HTTP request.

        Raises ApiError: 400 for a bad prompt, 429 where the queue is full, 503 at the end.
        """
        if self.draining:
            raise shutting_down()
        try:
            # Templates and tokenizing take milliseconds, in which streams go on.
            handle = await asyncio.to_thread(self._submit, request, request_id)
        except StarlingError as error:
            raise from_engine(error, request.prompt_field) from None
        self._running.add(handle)
        return handle

    def finish(self, handle: RequestHandle) -> None:
        """Forget a request; where it still runs, it is cancelled."""
        self._running.discard(handle)
        handle.cancel()

    def cancel_all(self) -> None:
        """End every request where it is."""
        for handle in tuple(self._running):
            handle.cancel()

    def _submit(self, request: ApiRequest, request_id: str) -> RequestHandle:
        ids = self._encoded(request)
        if len(ids) > self.limits.max_prompt:
            raise bad_field(
                request.prompt_field,
                f"the prompt has {len(ids)} tokens, but this server takes {self.limits.max_prompt}: shorten it",
                "context_length_exceeded",
            )
        is_chat = request.messages is not None
        return self._loop.submit(
            ids, request.params, deadline_s=request.deadline_s, reply=is_chat, request_id=request_id
        )

    def _encoded(self, request: ApiRequest) -> list[int]:
        if request.messages is not None:
            return self.engine.apply_chat_template(request.messages, request.template)
        if isinstance(request.prompt, list):
            return request.prompt
        if not request.prompt:
            raise bad_field("prompt", "prompt is empty: give at least one character")
        return self.engine.tokenizer.encode(request.prompt)
