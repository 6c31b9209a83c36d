"""One request's answer on the wire: a JSON object, or server-sent events; it ends when the client goes away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from time import perf_counter
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from starling.engine.batching.request import RequestHandle
from starling.engine.errors import RequestFailed, UserError
from starling.engine.generation.results import FinishReason, GenerationChunk, Timings
from starling.engine.generation.sampler import TokenLogprob
from starling.serving.api.api_errors import ApiError, out_of_time, shutting_down, unexpected
from starling.serving.api.interleave import interleave
from starling.serving.api.prompt_echo import PromptEcho
from starling.serving.api.replies import Choice, Logprobs, Reply, Usage, usage_of
from starling.serving.api.token_texts import RankedTable, ShownToken
from starling.serving.api.tool_replies import ToolReader
from starling.serving.http.request_bodies import ApiRequest
from starling.serving.http.request_log import RequestTrace, request_trace
from starling.serving.http.scoring_service import ScoringService
from starling.serving.http.service import Service, Submitted

_EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the events
]
DONE = b"data: [DONE]\n\n"


class _Candidate:
    """One generation of the request, as far as it has come."""

    def __init__(self, index: int, handle: RequestHandle, echo: PromptEcho | None, *, counts_prompt: bool) -> None:
        self.index, self.handle = index, handle
        #: What its text begins with.
        self.echo = echo
        #: Whether its prompt's tokens count: those of one prompt count once.
        self.counts_prompt = counts_prompt
        self.texts: list[str] = []
        #: Tokens that are part of the text, each with the offset of its own text in it.
        self.logprobs: list[ShownToken] = []
        #: Of all tokens, the end token too.
        self.log_probability = 0.0
        self.finish_reason = ""
        #: What the reward model gives it.
        self.reward: float | None = None
        self.timings: Timings | None = None
        self.offset = 0 if echo is None else len(echo.text)
        #: Whether its end is in the metrics.
        self.recorded = False
        self.opened = False
        #: Reads the calls of tools, where there are any.
        self.tools: ToolReader | None = None

    @property
    def merit(self) -> float:
        """What `best_of` goes by: the reward, else the mean log-probability of a token."""
        if self.reward is not None:
            return self.reward
        return self.log_probability / max(1, self.timings.new_tokens if self.timings else 1)


class Answer:
    """An ASGI response that reads the generations of one request to their end."""

    def __init__(
        self, service: Service, submitted: Submitted, reply: Reply, scoring: ScoringService | None = None
    ) -> None:
        """`scoring` has the reward model that the request names."""
        self._begin, self._scoring, self._reward_tokens = perf_counter(), scoring, 0
        request, handles, echoes = submitted.request, submitted.handles, submitted.echoes
        self._service, self._request, self._reply = service, request, reply
        self._ends = _end_tokens(service, request)
        self._candidates = [
            _Candidate(
                index,
                handle,
                echoes[index // request.candidates] if echoes else None,
                counts_prompt=index % request.candidates == 0,
            )
            for index, handle in enumerate(handles)
        ]
        if request.tools is not None and request.tool_format is not None:
            for candidate in self._candidates:
                candidate.tools = ToolReader(request.tool_format, request.tools)

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
                    candidate.texts.append(chunk.text)
                    candidate.logprobs += self._logprobs(candidate, chunk) or ()
                    if chunk.logprob is not None:
                        candidate.log_probability += chunk.logprob.logprob
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
        return self._reply.whole([self._choice(candidate) for candidate in self._chosen()], self._usage())

    async def _written(self, document: Callable[[], dict[str, Any]]) -> bytes:
        """Twenty alternatives of each of thousands of tokens take a second to write, in which streams go on."""
        return await self._service.work(lambda: _in_pieces(document()))

    async def _judge(self, trace: RequestTrace) -> None:
        """Give every candidate its reward: all of them are read together, what they begin with once."""
        assert self._scoring is not None
        left = None
        if self._request.deadline_s is not None:
            left = max(0.001, self._request.deadline_s - (perf_counter() - self._begin))
        answers = ["".join(candidate.texts) for candidate in self._candidates]
        rewards, self._reward_tokens = await self._scoring.rewards(
            self._request, answers, self._service.engine.tokenizer.decode, left, trace.id
        )
        for candidate, reward in zip(self._candidates, rewards, strict=True):
            candidate.reward = reward

    def _chosen(self) -> list[_Candidate]:
        """The choices of each prompt: its candidates, or the likeliest of them; by their reward where there is one."""
        choices = self._request.choices
        if choices == self._request.candidates and self._request.reward_model is None:
            return self._candidates
        return [
            candidate
            for candidates in self._by_prompt()
            for candidate in sorted(candidates, key=lambda one: one.merit, reverse=True)[:choices]
        ]

    def _by_prompt(self) -> list[list[_Candidate]]:
        per_prompt = self._request.candidates
        return [self._candidates[i : i + per_prompt] for i in range(0, len(self._candidates), per_prompt)]

    def _choice(self, candidate: _Candidate) -> Choice:
        text, logprobs = self._echo(candidate)
        if logprobs is not None:
            logprobs = [*logprobs, *candidate.logprobs]
        text += "".join(candidate.texts)
        reward, prompt = candidate.reward, self._prompt(candidate)
        if candidate.tools is None:
            return Choice(text, logprobs, candidate.finish_reason, reward=reward, prompt=prompt)
        text, calls = candidate.tools.whole(text)
        return Choice(text, logprobs, candidate.tools.finish_reason(candidate.finish_reason), calls, reward, prompt)

    def _prompt(self, candidate: _Candidate) -> Sequence[RankedTable | None] | None:
        """The `prompt_logprobs` of a choice, where the request asks for them."""
        wanted, entries = self._request.prompt_logprobs, candidate.handle.partial.prompt_logprobs
        if wanted is None or entries is None:
            return None
        return self._service.texts.ranked([_with_top(entry, wanted) for entry in entries])

    def _echo(self, candidate: _Candidate) -> tuple[str, Logprobs | None]:
        """What a choice begins with: its prompt where it is repeated, which has been run by now."""
        echo, wanted = candidate.echo, self._request.params.logprobs is not None
        if echo is None:
            return "", [] if wanted else None
        entries = candidate.handle.partial.prompt_logprobs if wanted else None
        if entries is None:
            return echo.text, None
        shown = [_with_top(entry, self._request.params.logprobs or 0) for entry in entries]
        return echo.text, [ShownToken(*each) for each in zip(echo.offsets, echo.ids, shown, strict=True)]

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
        await send({"type": "http.response.start", "status": 200, "headers": _EVENT_HEADERS})
        await _send_body(send, first)
        try:
            async for event in events:
                await _send_body(send, event)
        except Exception as error:
            refusal = error if isinstance(error, ApiError) else unexpected(trace.id)
            if refusal is not error:
                trace.note_failure(error)
            trace.note_refusal(refusal)
            await _send_body(send, _event(refusal.body()))
        await send({"type": "http.response.body", "body": DONE})

    async def _events(self, trace: RequestTrace) -> AsyncGenerator[bytes, None]:
        async with aclosing(self._chunks(trace)) as chunks:
            async for candidate, chunk in chunks:
                index = candidate.index
                if not candidate.opened:
                    candidate.opened = True
                    opening = self._reply.opening(index)
                    if opening is not None:
                        yield _event(opening)
                    if candidate.echo is not None:
                        yield await self._echo_event(candidate)
                logprobs = self._logprobs(candidate, chunk)
                text, calls, reason = self._read(candidate, chunk)
                if text or calls or logprobs or reason:
                    yield _event(self._reply.chunk(index, text, logprobs, reason, calls))
        if self._request.include_usage:
            yield _event(self._reply.usage_chunk(self._usage()))

    async def _echo_event(self, candidate: _Candidate) -> bytes:
        def piece() -> dict[str, Any]:
            text, logprobs = self._echo(candidate)
            return self._reply.chunk(candidate.index, text, logprobs, None)

        return b"data: " + await self._written(piece) + b"\n\n"

    async def _chunks(self, trace: RequestTrace) -> AsyncGenerator[tuple[_Candidate, GenerationChunk], None]:
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

    async def _chunks_of(self, candidate: _Candidate, trace: RequestTrace) -> AsyncGenerator[GenerationChunk, None]:
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

    def _read(self, candidate: _Candidate, chunk: GenerationChunk) -> tuple[str, list[dict[str, Any]], str | None]:
        """Text, calls of tools and finish_reason of a chunk."""
        tools, reason = candidate.tools, chunk.finish_reason
        if tools is None:
            return chunk.text, [], reason
        text, calls = tools.deltas(chunk.text, last=reason is not None)
        return text, calls, None if reason is None else tools.finish_reason(reason)

    def _record_end(self, candidate: _Candidate, trace: RequestTrace, timings: Timings, reason: FinishReason) -> None:
        """The one place where a generation's end enters the metrics and the log."""
        candidate.recorded, candidate.timings, candidate.finish_reason = True, timings, reason
        self._service.metrics.record(timings)
        trace.note_end(timings, reason, prompt_tokens=timings.prompt_tokens if candidate.counts_prompt else 0)

    def _logprobs(self, candidate: _Candidate, chunk: GenerationChunk) -> Logprobs | None:
        offset = candidate.offset
        candidate.offset += len(chunk.text)
        if self._request.params.logprobs is None:
            return None
        if chunk.logprob is None or chunk.token in self._ends:
            return []
        token = chunk.logprob.token
        return [ShownToken(self._service.texts.begin(token, chunk.text, offset), token, chunk.logprob)]

    async def _cancel_on_disconnect(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        for candidate in self._candidates:
            candidate.handle.cancel()


def _with_top(entry: TokenLogprob | None, most: int) -> TokenLogprob | None:
    """The entry with so many alternatives: `echo` and `prompt_logprobs` may ask for other numbers of them."""
    return entry if entry is None or len(entry.top) <= most else replace(entry, top=entry.top[:most])


class Refusal(JSONResponse):
    """An error as the response to a request, in whose log line it stands."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.body(), status_code=error.status, headers=error.headers)
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        request_trace(scope).note_refusal(self._error)
        await super().__call__(scope, receive, send)

    def render(self, content: Any) -> bytes:
        """The body. Half a surrogate pair, which JSON can bring in and UTF-8 cannot hold, becomes a question mark."""
        return json_bytes(content)


async def _send_body(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


def _event(document: dict[str, Any]) -> bytes:
    return b"data: " + json_bytes(document) + b"\n\n"


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def json_bytes(document: Any) -> bytes:
    """The document in UTF-8, which cannot hold half a surrogate pair: that becomes a question mark."""
    return _ENCODER.encode(document).encode("utf-8", "replace")


def _in_pieces(document: Any) -> bytes:
    """The same; the interpreter can turn to other threads in between."""
    return "".join(_ENCODER.iterencode(document)).encode("utf-8", "replace")


def _end_tokens(service: Service, request: ApiRequest) -> frozenset[int]:
    """Tokens that end the answer and are no part of its text."""
    own = () if request.params.ignore_eos else service.engine.bundle.tokens.eos
    return frozenset((*own, *request.params.stop_token_ids))
