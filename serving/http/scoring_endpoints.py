"""The endpoints of a model that scores or embeds: /classify, /pooling, /score, /rerank, /v1/embeddings."""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from starling.engine.names import Task
from starling.serving.api.api_errors import bad_field
from starling.serving.api.fields import json_object
from starling.serving.http.body import json_bytes, read_body
from starling.serving.http.request_log import request_trace
from starling.serving.http.scoring_bodies import (
    Reader,
    classify_request,
    embedding_request,
    pooling_request,
    rerank_request,
    score_request,
)
from starling.serving.http.scoring_service import Scored, ScoringService, no_such_model

_NOT_HERE: Mapping[Task, str] = {
    "score": "no model here scores texts: start the server with one that does, or add one with --reward-model",
    "embed": "no model here embeds texts: export one with --task embed, and start the server with it",
}
Document = dict[str, Any]


class ScoringEndpoints:
    """Each endpoint is one method; without a `service` all say that there is no model for them."""

    def __init__(self, service: ScoringService | None, max_body: int) -> None:
        self._service, self._max_body = service, max_body

    def routes(self) -> list[Route]:
        """Every path that is answered."""
        paths: dict[str, Callable[[Request], Any]] = {
            "/classify": self.classify,
            "/pooling": self.pooling,
            "/score": self.score,
            "/v1/score": self.score,
            "/rerank": self.rerank,
            "/v1/rerank": self.rerank,
            "/v2/rerank": self.rerank,
            "/v1/embeddings": self.embeddings,
        }
        return [Route(path, endpoint, methods=["POST"]) for path, endpoint in paths.items()]

    async def classify(self, request: Request) -> Response:
        """POST /classify."""
        return await self._answer(request, ("score",), classify_request, self._classes)

    async def pooling(self, request: Request) -> Response:
        """POST /pooling."""
        task: Task = "score" if self._service is None else self._service.engine.bundle.task
        return await self._answer(request, ("score", "embed"), partial(pooling_request, task=task), _pooled)

    async def score(self, request: Request) -> Response:
        """POST /score and /v1/score."""
        return await self._answer(request, ("score",), score_request, self._pair_scores)

    async def rerank(self, request: Request) -> Response:
        """POST /rerank, /v1/rerank and /v2/rerank."""
        return await self._answer(request, ("score",), rerank_request, self._ranked)

    async def embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings."""
        normalize = self._service is None or self._service.engine.pooler.pooling.normalize
        return await self._answer(request, ("embed",), partial(embedding_request, normalize=normalize), _embeddings)

    async def _answer(
        self, request: Request, tasks: tuple[Task, ...], read: Reader, write: Callable[[Scored], Document]
    ) -> Response:
        service, trace = self._service, request_trace(request.scope)
        if service is None or service.engine.bundle.task not in tasks:
            raise no_such_model(_NOT_HERE[tasks[0]])
        body = await read_body(request, self._max_body)

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        scored = await service.answer(lambda: read(json_object(body), service.models), trace.id, gone)
        trace.note_ignored(scored.request.ignored)
        trace.note_prompt_tokens(sum(scored.tokens))
        content = await service.work(lambda: json_bytes(write(scored)))
        return Response(content, media_type="application/json")

    def _labels(self) -> tuple[str, ...]:
        assert self._service is not None
        return self._service.engine.pooler.pooling.labels

    def _classes(self, scored: Scored) -> Document:
        labels = self._labels()
        data = [
            {"index": index, "label": labels[int(row.argmax())], "probs": row.tolist(), "num_classes": len(labels)}
            for index, row in enumerate(scored.vectors)
        ]
        return _head("classify", scored) | {"data": data, "usage": _usage(scored)}

    def _pair_scores(self, scored: Scored) -> Document:
        data = [
            {"index": index, "object": "score", "score": score} for index, score in enumerate(self._only_label(scored))
        ]
        return _head("score", scored) | {"data": data, "usage": _usage(scored)}

    def _ranked(self, scored: Scored) -> Document:
        request, scores = scored.request, self._only_label(scored)
        order = sorted(range(len(scores)), key=lambda index: -scores[index])[: request.top_n]
        results: list[Document] = [{"index": index, "relevance_score": scores[index]} for index in order]
        if request.return_documents:
            for result in results:
                result["document"] = {"text": request.texts[result["index"]][1]}
        usage = {"total_tokens": sum(scored.tokens), "prompt_tokens": sum(scored.tokens)}
        return {"id": f"rerank-{uuid.uuid4().hex}", "model": request.model, "usage": usage, "results": results}

    def _only_label(self, scored: Scored) -> list[float]:
        if len(labels := self._labels()) != 1:
            raise bad_field("model", f"this model gives {len(labels)} scores of a text, not one: use /classify")
        scores: list[float] = scored.vectors[:, 0].tolist()
        return scores


def _pooled(scored: Scored) -> Document:
    data = [{"index": index, "object": "pooling", "data": value} for index, value in enumerate(_values(scored))]
    return _head("pool", scored) | {"data": data, "usage": _usage(scored)}


def _embeddings(scored: Scored) -> Document:
    data = [{"index": index, "object": "embedding", "embedding": value} for index, value in enumerate(_values(scored))]
    usage = {"prompt_tokens": sum(scored.tokens), "total_tokens": sum(scored.tokens)}
    return {"object": "list", "data": data, "model": scored.request.model, "usage": usage}


def _values(scored: Scored) -> list[Any]:
    """Each text's numbers as a list, or in Base64 as OpenAI's clients ask for them: little-endian float32."""
    if not scored.request.base64:
        listed: list[Any] = scored.vectors.tolist()
        return listed
    return [base64.b64encode(np.asarray(row, "<f4").tobytes()).decode() for row in scored.vectors]


def _head(prefix: str, scored: Scored) -> Document:
    own = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": "list", "created": int(time.time())}
    return own | {"model": scored.request.model}


def _usage(scored: Scored) -> Document:
    tokens = sum(scored.tokens)
    return {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0, "prompt_tokens_details": None}
