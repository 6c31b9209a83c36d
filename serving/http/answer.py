"""One request's answer on the wire: a JSON object, or server-sent events; it ends when the client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from time import perf_counter
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from starling.engine.errors import RequestFailed, UserError
from starling.engine.generation.results import FinishReason, GenerationChunk, Timings
from starling.serving.api.api_errors import ApiError, out_of_time, shutting_down, unexpected
from starling.serving.api.interleave import interleave
from starling.serving.api.replies import Reply, Usage, usage_of
from starling.serving.http.body import DONE, EVENT_HEADERS, Refusal, event, json_bytes, json_in_pieces
from starling.serving.http.candidate import Candidate
from starling.serving.http.request_bodies import ApiRequest
from starling.serving.http.request_log import RequestTrace, request_trace
from starling.serving.http.scoring_service import ScoringService
from starling.serving.http.service import Service, Submitted


class Answer:
    """An ASGI response that reads the generations of one request to their end."""

    def __init__(
        self, service: Service, submitted: Submitted, reply: Reply, scoring: ScoringService | None = None
    ) -> None:
        """`scoring` has the reward model that the request names."""
        self._begin, self._scoring, self._reward_tokens = perf_counter(), scoring, 0
        request, handles, echoes = submitted.request, submitted.handles, submitted.echoes
        self._service, self._request, self._reply = service, request, reply
        ends = _end_tokens(service, request)
        self._candidates = [
            Candidate(
                index,
                handle,
                request,
                service.texts,
                ends,
                echoes[index // request.candidates] if echoes else None,
            )
            for index, handle in enumerate(handles)
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer. A client that goes away cancels its request, which frees the rows within a step."""
        trace = request_trace(scope)
        watcher = asyncio.create_task(self._cancel_on_disconnect(receive))
        try:
            if self._request.stream:
                await self._stream(trace, scope, receive, send)
            else:
                await self._whole(trace, scope, receive, send)
        finally:
            watcher.cancel()
            for candidate in self._candidates:
                self._service.finish(candidate.handle, recorded=candidate.recorded)

    async def _whole(self, trace: RequestTrace, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._chunks(trace)) as chunks:
                async for candidate, chunk in chunks:
                    candidate.add(chunk)
            if self._request.reward_model is not None:
                await self._judge(trace)
        except ApiError as error:
            await Refusal(error)(scope, receive, send)
            return
        if self._request.params.logprobs is None and self._request.prompt_logprobs is None:
            content = json_bytes(self._document())
        else:
            content = await self._written(self._document)
        await Response(content, media_type="application/json")(scope, receive, send)

    def _document(self) -> dict[str, Any]:
        return self._reply.whole([candidate.choice() for candidate in self._chosen()], self._usage())

    async def _written(self, document: Callable[[], dict[str, Any]]) -> bytes:
        """Twenty alternatives of each of thousands of tokens take a second to write, in which streams go on."""
        return await self._service.work(lambda: json_in_pieces(document()))

    async def _judge(self, trace: RequestTrace) -> None:
        """Give every candidate its reward: all of them are read together, what they begin with once."""
        assert self._scoring is not None
        left = None
        if self._request.deadline_s is not None:
            left = max(0.001, self._request.deadline_s - (perf_counter() - self._begin))
        answers = [candidate.text for candidate in self._candidates]
        rewards, self._reward_tokens = await self._scoring.rewards(
            self._request, answers, self._service.engine.tokenizer.decode, left, trace.id
        )
        for candidate, reward in zip(self._candidates, rewards, strict=True):
            candidate.reward = reward

    def _chosen(self) -> list[Candidate]:
        """The choices of each prompt: its candidates, or the likeliest of them; by their reward where there is one."""
        choices = self._request.choices
        if choices == self._request.candidates and self._request.reward_model is None:
            return self._candidates
        return [
            candidate
            for candidates in self._by_prompt()
            for candidate in sorted(candidates, key=lambda one: one.merit, reverse=True)[:choices]
        ]

    def _by_prompt(self) -> list[list[Candidate]]:
        per_prompt = self._request.candidates
        return [self._candidates[i : i + per_prompt] for i in range(0, len(self._candidates), per_prompt)]

    def _usage(self) -> Usage:
        total = Usage(0, 0)
        for candidates in self._by_prompt():
            total += usage_of([candidate.timings for candidate in candidates if candidate.timings is not None])
        return total if self._request.reward_model is None else replace(total, reward=self._reward_tokens)

    async def _stream(self, trace: RequestTrace, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events(trace)) as events:
            await self._send_events(events, trace, scope, receive, send)

    async def _send_events(
        self, events: AsyncGenerator[bytes, None], trace: RequestTrace, scope: Scope, receive: Receive, send: Send
    ) -> None:
        try:
            # The status waits for the first token: a request that fails before it gets its own.
            first = await anext(events)
        except ApiError as error:
            await Refusal(error)(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": EVENT_HEADERS})
        await _send_body(send, first)
        try:
            async for following in events:
                await _send_body(send, following)
        except Exception as error:
            refusal = error if isinstance(error, ApiError) else unexpected(trace.id)
            if refusal is not error:
                trace.note_failure(error)
            trace.note_refusal(refusal)
            await _send_body(send, event(refusal.body()))
        await send({"type": "http.response.body", "body": DONE})

    async def _events(self, trace: RequestTrace) -> AsyncGenerator[bytes, None]:
        async with aclosing(self._chunks(trace)) as chunks:
            async for candidate, chunk in chunks:
                index = candidate.index
                if not candidate.opened:
                    candidate.opened = True
                    opening = self._reply.opening(index)
                    if opening is not None:
                        yield event(opening)
                    if candidate.echo is not None:
                        yield await self._echo_event(candidate)
                logprobs = candidate.logprobs(chunk)
                text, calls, reason = candidate.read(chunk)
                if text or calls or logprobs or reason:
                    yield event(self._reply.chunk(index, text, logprobs, reason, calls))
        if self._request.include_usage:
            yield event(self._reply.usage_chunk(self._usage()))

    async def _echo_event(self, candidate: Candidate) -> bytes:
        def piece() -> dict[str, Any]:
            text, logprobs = candidate.opening()
            return self._reply.chunk(candidate.index, text, logprobs, None)

        return b"data: " + await self._written(piece) + b"\n\n"

    async def _chunks(self, trace: RequestTrace) -> AsyncGenerator[tuple[Candidate, GenerationChunk], None]:
        """The chunks of all candidates, as they come. Raises ApiError where one does not end well."""
        sources = [self._chunks_of(candidate, trace) for candidate in self._candidates]
        if len(sources) == 1:  # the usual case needs no tasks
            async with aclosing(sources[0]) as only:
                async for chunk in only:
                    yield self._candidates[0], chunk
            return
        async with aclosing(interleave(sources)) as chunks:
            async for index, chunk in chunks:
                yield self._candidates[index], chunk

    async def _chunks_of(self, candidate: Candidate, trace: RequestTrace) -> AsyncGenerator[GenerationChunk, None]:
        try:
            async for chunk in candidate.handle.chunks():
                if chunk.timings is not None and chunk.finish_reason is not None:
                    self._record_end(candidate, trace, chunk.timings, chunk.finish_reason)
                if chunk.finish_reason == "deadline":
                    raise out_of_time(f"deadline_s was {self._request.deadline_s}: the answer was not complete by then")
                if chunk.finish_reason in ("cancelled", "interrupted"):
                    raise shutting_down()
                yield chunk
        except RequestFailed as error:
            self._record_end(candidate, trace, candidate.handle.partial.timings, "failed")
            if isinstance(error.__cause__, UserError):  # what it forbids leaves nothing to choose
                cause = error.__cause__
                raise ApiError(400, cause.client_message, param=cause.field, logged=cause.problem) from error
            trace.note_failure(error)
            raise unexpected(trace.id) from error

    def _record_end(self, candidate: Candidate, trace: RequestTrace, timings: Timings, reason: FinishReason) -> None:
        """The one place where a generation's end enters the metrics and the log."""
        candidate.recorded, candidate.timings, candidate.finish_reason = True, timings, reason
        self._service.metrics.record(timings)
        trace.note_end(timings, reason, prompt_tokens=timings.prompt_tokens if candidate.counts_prompt else 0)

    async def _cancel_on_disconnect(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        for candidate in self._candidates:
            candidate.handle.cancel()


async def _send_body(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


def _end_tokens(service: Service, request: ApiRequest) -> frozenset[int]:
    """Tokens that end the answer and are no part of its text."""
    own = () if request.params.ignore_eos else service.engine.bundle.tokens.eos
    return frozenset((*own, *request.params.stop_token_ids))
