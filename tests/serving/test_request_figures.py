"""However requests end, and many at a time, the figures of the service come out even."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from starling.engine.engine import Engine
from starling.engine.serving_loop import ServingLoop
from starling.serving.http.app import make_app
from starling.serving.http.request_bodies import API_DEFAULTS, Limits
from starling.serving.http.served import Served
from starling.serving.http.service import Service

REQUESTS, TOGETHER = 120, 12
LIMITS = Limits(models=("m",), max_seq=64, max_prompt=64, defaults=API_DEFAULTS)


@pytest.fixture(scope="module")
def service(tiny_bundle: Path) -> Iterator[Service]:
    with Engine(tiny_bundle, max_seq=64, max_batch=4, threads=1) as engine, ServingLoop(engine, queue_limit=6) as loop:
        made = Service(engine, loop, LIMITS)
        yield made
        made.close()


def test_failed_late_cancelled_and_whole_requests_are_in_every_figure(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, draw = service.engine.backend, random.Random(1)
    decode = backend.decode

    def fails_at_times(*arguments: Any) -> Any:
        if draw.random() < 0.02:
            raise ValueError("broken on purpose")
        return decode(*arguments)

    monkeypatch.setattr(backend, "decode", fails_at_times)
    statuses = asyncio.run(_many(make_app(Served(service, None), max_body=10_000)))
    # Each way to end came: whole, failed, late, gone, refused for a full queue, and for a bad field.
    assert {200, 500, 504, 499, 429, 400} <= set(statuses), statuses
    assert sum(statuses.values()) == REQUESTS

    figures = _figures(service)
    ended = figures["vllm:request_success_total"]
    accepted = REQUESTS - statuses[400] - statuses[429]
    assert ended == accepted
    assert figures["vllm:request_prompt_tokens_count"] == figures["vllm:request_generation_tokens_count"] == ended
    assert figures["vllm:request_generation_tokens_sum"] == figures["vllm:generation_tokens_total"]
    assert figures["vllm:num_requests_running"] == figures["vllm:num_requests_waiting"] == 0
    # Times are of requests that had a token.
    assert (
        figures["vllm:e2e_request_latency_seconds_count"] == figures["vllm:time_to_first_token_seconds_count"] <= ended
    )


async def _many(app: Any) -> Counter[int]:
    turns = asyncio.Semaphore(TOGETHER)

    async def one(number: int) -> int:
        async with turns:
            return await _ask(app, number)

    statuses = Counter(await asyncio.gather(*map(one, range(REQUESTS))))
    while len(asyncio.all_tasks()) > 1:
        await asyncio.sleep(0.01)
    return statuses


async def _ask(app: Any, number: int) -> int:
    """The status of a request; 499 where its client went away in the middle of it, 500 too for a stream's failure."""
    draw = random.Random(number)
    fields: dict[str, Any] = {"model": "m", "prompt": "Once " * draw.randint(1, 20), "max_tokens": draw.randint(1, 30)}
    fields |= {"stream": draw.random() < 0.5, "ignore_eos": True}
    gone = draw.random() < 0.15
    if draw.random() < 0.15:
        fields["deadline_s"] = draw.choice((1e-6, 0.01))
    if draw.random() < 0.1:
        fields["temperature"] = "warm"
    received = [{"type": "http.request", "body": json.dumps(fields).encode(), "more_body": False}]
    leave, sent = asyncio.Event(), list[dict[str, Any]]()

    async def receive() -> dict[str, Any]:
        if received:
            return received.pop()
        await (asyncio.sleep(0.01) if gone else leave.wait())
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": headers}
    await app(scope | {"client": None}, receive, send)
    leave.set()
    body = b"".join(message.get("body", b"") for message in sent)
    status: int = sent[0]["status"]
    if status == 503:  # the client had gone
        return 499
    if b"deadline_exceeded" in body:
        return 504
    return 500 if b"server_error" in body else 499 if b"shutting_down" in body else status


def _figures(service: Service) -> Counter[str]:
    figures = Counter[str]()
    for line in service.metrics.export().decode().splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            figures[name.partition("{")[0]] += float(value)  # type: ignore[assignment]
    return figures
