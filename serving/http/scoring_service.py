"""A model that scores or embeds, behind the HTTP endpoints: its texts are read by workers and run by its own loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar, cast

from starling.engine.backends.pooling_backend import Vectors
from starling.engine.engine import Engine
from starling.engine.errors import RequestFailed, StarlingError
from starling.engine.pooling.text_pooler import PreparedText, TextInput
from starling.engine.pooling_loop import PoolingLoop
from starling.serving.api.api_errors import ApiError, from_engine, out_of_time, shutting_down, unexpected
from starling.serving.http.request_bodies import ApiRequest
from starling.serving.http.scoring_bodies import Pair, ScoringRequest
from starling.serving.metrics.prometheus import PrometheusMetrics

T = TypeVar("T")

WORKERS = 2
_FIELD_OF = {"truncate": "truncate_prompt_tokens"}


@dataclass(frozen=True, slots=True)
class Scored:
    """A request and its numbers, float32 [texts, width], activated where it asked for that; `tokens` of each text."""

    request: ScoringRequest
    vectors: Vectors
    tokens: tuple[int, ...]


class ScoringService:
    """An engine that scores or embeds, its loop, and the requests that run on it. `models` are its names."""

    def __init__(self, engine: Engine, loop: PoolingLoop, models: Sequence[str]) -> None:
        self.engine, self.models = engine, tuple(models)
        #: True once the server ends: what runs is finished, nothing new begins.
        self.draining = False
        self.metrics = PrometheusMetrics(self.models[0], loop.stats)
        loop.on_end = self.metrics.record
        self._loop = loop
        self._running: set[Future[Vectors]] = set()
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="starling-scoring")
        engine.chat_templates  # noqa: B018 (a template that is none ends the start, not the first chat)

    @property
    def failed(self) -> bool:
        """Whether the loop has ended by a failure: nothing is answered until the process starts anew."""
        return self._loop.failure is not None

    async def answer(
        self, read: Callable[[], ScoringRequest], request_id: str, gone: Callable[[], Awaitable[None]]
    ) -> Scored:
        """Read a request, run its texts and wait for them; `gone` returns where the client has gone away.

        Raises ApiError: what `read` raises, 400 for a bad text, 429 where too many wait, 503 at the end, 504 for one
        that is late, 500 where a run failed.
        """
        if self.draining:
            raise shutting_down()
        request, texts = await self.work(lambda: self._read(read))
        vectors = await self.run(texts, request.deadline_s, request_id, gone)
        if request.activation:
            vectors = self.engine.pooler.activated(vectors)
        return Scored(request, vectors, tuple(text.tokens for text in texts))

    async def run(
        self,
        texts: Sequence[PreparedText],
        deadline_s: float | None,
        request_id: str,
        gone: Callable[[], Awaitable[None]] | None = None,
    ) -> Vectors:
        """The raw numbers of texts. Raises ApiError as `answer` does."""
        try:
            future = self._loop.submit(texts)
        except StarlingError as error:
            raise from_engine(error, "input") from None
        self._running.add(future)
        watcher = None if gone is None else asyncio.create_task(_cancel(future, gone))
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), deadline_s)
        except TimeoutError:
            raise out_of_time(f"deadline_s was {deadline_s}: the answer was not complete by then") from None
        except asyncio.CancelledError:
            if future.cancelled():
                raise shutting_down() from None
            raise
        except RequestFailed as error:
            raise unexpected(request_id) from error
        except StarlingError as error:
            raise from_engine(error, "input") from None
        finally:
            future.cancel()
            self._running.discard(future)
            if watcher is not None:
                watcher.cancel()

    async def rewards(
        self,
        request: ApiRequest,
        answers: Sequence[str],
        decode: Callable[[Sequence[int]], str],
        deadline_s: float | None,
        request_id: str,
    ) -> tuple[list[float], int]:
        """The reward of each answer to the request's prompts, in the order of its generations; tokens of all of them.

        A chat goes through this model's own template, a prompt and its answer are one text. `decode` makes text of a
        prompt's token ids. Raises ApiError as `answer` does.
        """
        texts = await self.work(lambda: self._answered(request, answers, decode))
        vectors = await self.run(texts, deadline_s, request_id)
        return vectors[:, 0].tolist(), sum(text.tokens for text in texts)

    def _answered(
        self, request: ApiRequest, answers: Sequence[str], decode: Callable[[Sequence[int]], str]
    ) -> list[PreparedText]:
        prompts = [prompt if isinstance(prompt, str) else decode(prompt) for prompt in request.prompts]
        texts: list[TextInput] = [
            [*request.messages, {"role": "assistant", "content": answer}]
            if request.messages is not None
            else prompts[index // request.candidates] + answer
            for index, answer in enumerate(answers)
        ]
        try:
            return [self.engine.pooler.prepare(text) for text in texts]
        except StarlingError as error:
            refusal = from_engine(error, "reward_model")
            refusal.param = "reward_model"
            raise refusal from None

    def prepare(self, text: TextInput | Pair, request: ScoringRequest) -> PreparedText:
        """The tokens of a text, or of a pair. Raises PromptError, or UserError for a setting."""
        pooler = self.engine.pooler
        given = pooler.paired(*cast(Pair, text)) if isinstance(text, tuple) else text
        return pooler.prepare(given, template=request.template, truncate=request.truncate, side=request.side)

    async def work(self, task: Callable[[], T]) -> T:
        """What a task returns that takes long, for the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, task)

    def cancel_all(self) -> None:
        """Drop all texts that have not run."""
        for future in tuple(self._running):
            future.cancel()

    def close(self) -> None:
        """End the workers; what they have not begun is dropped."""
        self._workers.shutdown(wait=False, cancel_futures=True)

    def _read(self, read: Callable[[], ScoringRequest]) -> tuple[ScoringRequest, list[PreparedText]]:
        request = read()
        try:
            return request, [self.prepare(text, request) for text in request.texts]
        except StarlingError as error:
            refusal = from_engine(error, request.field)
            refusal.param = _FIELD_OF.get(str(refusal.param), refusal.param)
            raise refusal from None


async def _cancel(future: Future[Vectors], gone: Callable[[], Awaitable[None]]) -> None:
    await gone()
    future.cancel()


def no_such_model(what: str) -> ApiError:
    """A request to a server that has no model for it."""
    return ApiError(404, what, param="model", code="model_not_found")
