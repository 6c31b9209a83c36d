"""Requests of mixed length with random disconnects and bad fields against a server of `starling triton`.

    python -m starling.profiling.load.over_triton --http 127.0.0.1:8000 --metrics 127.0.0.1:8002 --pid PID

Every request must end in an answer, the client's own disconnect, or a refusal that names the field; afterwards rows,
metrics and memory must come out even. The clients are the standard library's.
"""

from __future__ import annotations

import json
import random
import sys
import time
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPResponse
from typing import Any

from starling.profiling.load.server_state import TIMEOUT_S, counted, resident_mb

#: How often each kind comes, per 20 requests.
KINDS = {"answered": 6, "streamed": 6, "disconnected": 5, "refused": 3}
#: A bad field, and what the refusal must name.
BAD_FIELDS: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("ensemble", {"beam_width": 4}, "beam_width"),
    ("ensemble", {"top_p": 7.0}, "top_p"),
    ("ensemble", {"max_tokens": -1}, "max_tokens"),
    ("ensemble", {"no_such_field": 1}, "no_such_field"),
    ("vllm_model", {"sampling_parameters": '{"n": 3}'}, "sampling_parameters: n"),
    ("vllm_model", {"sampling_parameters": "{"}, "sampling_parameters"),
)


class Load:
    """The requests, numbered; each is made from its number alone."""

    def __init__(self, http: str, seed: int) -> None:
        self._http, self._seed = http, seed
        self._kinds = [kind for kind, count in KINDS.items() for _ in range(count)]

    def run(self, number: int) -> str:
        """Send one request; its outcome. Raises where it ends in neither an answer nor a clear refusal."""
        chance = random.Random(self._seed * 1_000_003 + number)
        kind = chance.choice(self._kinds)
        if kind == "refused":
            self._refused(chance)
        else:
            self._sent(kind, chance)
        return kind

    def _sent(self, kind: str, chance: random.Random) -> None:
        model, fields = _request(chance, stream=kind != "answered")
        endpoint = "generate" if kind == "answered" else "generate_stream"
        connection, answer = self._post(model, endpoint, fields)
        try:
            if answer.status != 200:
                raise RuntimeError(f"{model}/{endpoint}: {answer.status} {answer.read()!r}")
            if kind == "disconnected":
                time.sleep(chance.random() * 0.5)
                return
            body = answer.read().decode()
            if '"error"' in body or '"text_output"' not in body:
                raise RuntimeError(f"{model}/{endpoint}: {body!r}")
        finally:
            connection.close()

    def _refused(self, chance: random.Random) -> None:
        model, bad, name = chance.choice(BAD_FIELDS)
        _, fields = _request(chance, stream=False, model=model)
        connection, answer = self._post(model, "generate", {**fields, **bad})
        body = answer.read().decode()
        connection.close()
        if answer.status != 400 or name not in json.loads(body)["error"]:
            raise RuntimeError(f"{bad} was answered with {answer.status} {body!r}")

    def _post(self, model: str, endpoint: str, fields: dict[str, Any]) -> tuple[HTTPConnection, HTTPResponse]:
        connection = HTTPConnection(self._http, timeout=TIMEOUT_S)
        connection.request("POST", f"/v2/models/{model}/{endpoint}", json.dumps(fields))
        return connection, connection.getresponse()


def _request(chance: random.Random, *, stream: bool, model: str | None = None) -> tuple[str, dict[str, Any]]:
    model = model or chance.choice(("ensemble", "vllm_model"))
    text, tokens = " ".join(["word"] * chance.randint(1, 120)), chance.randint(1, 32)
    fields: dict[str, Any] = {"text_input": text, "stream": stream}
    if model == "ensemble":
        return model, {**fields, "max_tokens": tokens}
    return model, {**fields, "sampling_parameters": json.dumps({"temperature": 0.8, "seed": 1, "max_tokens": tokens})}


def stats(http: str) -> dict[str, Any]:
    """The scheduler's figures, as the model `starling` tells them."""
    connection = HTTPConnection(http, timeout=TIMEOUT_S)
    connection.request("POST", "/v2/models/starling/generate", json.dumps({"command": "stats"}))
    figures: dict[str, Any] = json.loads(json.loads(connection.getresponse().read())["answer"])
    connection.close()
    return figures


def idle_stats(http: str) -> dict[str, Any]:
    """The figures when nothing runs or waits any more; TimeoutError where that does not come."""
    end = time.monotonic() + TIMEOUT_S
    while (figures := stats(http))["running"] or figures["waiting"]:
        if time.monotonic() > end:
            raise TimeoutError(f"requests have not ended: {figures}")
        time.sleep(0.1)
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the load and print one JSON document; exit code 1 where something does not come out even."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--http", default="127.0.0.1:8000")
    parser.add_argument("--metrics", default="127.0.0.1:8002")
    parser.add_argument("--pid", type=int, help="the server's process, for its memory")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    load = Load(options.http, options.seed)
    with ThreadPoolExecutor(options.concurrency) as pool:  # what a first use allocates is no leak
        list(pool.map(load.run, range(-2 * options.concurrency, 0)))
    before = idle_stats(options.http)
    memory_before = resident_mb(options.pid) if options.pid else None
    begin = time.perf_counter()
    with ThreadPoolExecutor(options.concurrency) as pool:
        outcomes = Counter(pool.map(load.run, range(options.requests)))
    after = idle_stats(options.http)
    seconds = time.perf_counter() - begin
    time.sleep(1)  # the metrics are refreshed four times a second
    metrics = counted(options.metrics)
    ended = sum(after["ended"].values())
    tokens = after["generated_tokens"]
    even = (
        after["submitted"] == ended
        and after["submitted"] - before["submitted"] == options.requests - outcomes["refused"]
        and metrics == {"tokens": tokens, "ended": ended, "observed": ended, "observed_tokens": tokens}
    )
    document = {
        "requests": options.requests,
        "outcomes": dict(outcomes),
        "seconds": round(seconds, 1),
        "generated_tokens": after["generated_tokens"] - before["generated_tokens"],
        "before": before,
        "after": after,
        "metrics": metrics,
        "rss_mb_before": memory_before,
        "rss_mb_after": resident_mb(options.pid) if options.pid else None,
        "even": even,
    }
    print(json.dumps(document))
    return 0 if even else 1


if __name__ == "__main__":
    sys.exit(main())
