"""Requests of mixed length with disconnects, bad fields, deadlines and a full queue against `starling serve`.

Some share the begin of their prompt, some ask for several choices.

    starling serve BUNDLE --max-batch 4 --max-queue 4 &
    python -m starling.profiling.load.over_http --http 127.0.0.1:8000 --pid PID

Every request must end in an answer, the client's own disconnect, or a refusal that says why; afterwards rows,
metrics and memory must come out even. With `--alone` each whole answer is asked for again with nothing beside it, and
must have the same texts. The clients are the standard library's.
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

from starling.profiling.load.server_state import TIMEOUT_S, counted, metric_samples, resident_mb

#: How often each kind comes, per 40 requests.
KINDS = {"whole": 10, "streamed": 10, "disconnected": 7, "abandoned": 3, "refused": 6, "late": 3, "too long": 1}
#: Outcomes of requests that the server took in, beside those that came to their end; what is "abandoned" before an
#: answer may have been taken in or not.
CUT_SHORT = ("disconnected", "late")
#: Fields that are refused, and the one that the refusal must name.
BAD_FIELDS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"temperature": -1}, "temperature"),
    ({"top_p": 7}, "top_p"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"stream": "yes"}, "stream"),
    ({"max_token": 1}, "max_token"),
    ({"model": "another"}, "model"),
)
TOO_LONG_WORDS = 20_000
#: The begin of every third prompt, so that rows are made of known prefixes.
SHARED_PREFIX = "You are a helpful assistant. Answer in one short sentence. " * 12
#: Batches that the requests come in, with a look at the memory after each.
ROUNDS = 10
#: A client that is gone may not have been noticed yet.
SETTLE_S = 1.0


class ServeLoad:
    """The requests, numbered; each is made from its number and the seed alone."""

    def __init__(self, http: str, seed: int) -> None:
        self._http, self._seed, self._model = http, seed, _served_model(http)
        self._kinds = [kind for kind, count in KINDS.items() for _ in range(count)]
        #: The texts of the requests that came to their end, by number: one for each choice.
        self.texts: dict[int, list[str]] = {}

    def run(self, number: int) -> str:
        """Send one request; its outcome. Raises RuntimeError where it ends in neither an answer nor a clear refusal."""
        outcome, body = self._send(number)
        if outcome in ("whole", "streamed"):
            self.texts[number] = _texts(body)
        return outcome

    def differ_alone(self) -> list[int]:
        """Ask again for all that came to its end, one after the other: the numbers of those whose texts differ."""
        return [number for number, texts in self.texts.items() if _texts(self._send(number)[1]) != texts]

    def _send(self, number: int) -> tuple[str, str]:
        """The outcome of a request and its answer's body, "" where it was not read."""
        chance = random.Random(self._seed * 1_000_003 + number)
        kind = chance.choice(self._kinds)
        path, fields = _request(chance, kind, self._model)
        wrong = ""
        if kind == "refused":
            bad, wrong = chance.choice(BAD_FIELDS)
            fields |= bad
        connection = HTTPConnection(self._http, timeout=TIMEOUT_S)
        try:
            connection.request("POST", path, json.dumps(fields), {"Content-Type": "application/json"})
            if kind == "abandoned":
                time.sleep(chance.random() * 0.2)
                return kind, ""
            return _outcome(kind, wrong, connection.getresponse(), chance)
        finally:
            connection.close()


def _served_model(http: str) -> str:
    connection = HTTPConnection(http, timeout=TIMEOUT_S)
    connection.request("GET", "/v1/models")
    name: str = json.loads(connection.getresponse().read())["data"][0]["id"]
    connection.close()
    return name


def _request(chance: random.Random, kind: str, model: str) -> tuple[str, dict[str, Any]]:
    """Path and body of one request, with nothing wrong but its length where it is to be too long."""
    words = TOO_LONG_WORDS if kind == "too long" else chance.randint(1, 120)
    text, chat = " ".join(["word"] * words), chance.random() < 0.5
    text = SHARED_PREFIX + text if chance.random() < 1 / 3 else text
    fields: dict[str, Any] = {
        "model": model,
        "max_tokens": chance.randint(1, 32),
        "temperature": chance.choice((0, 0.8)),
        "seed": chance.randint(0, 99),
        "stream": kind == "disconnected" or kind == "streamed" or (kind != "whole" and chance.random() < 0.5),
    }
    if kind in ("whole", "streamed") and chance.random() < 0.2:
        fields["n"] = chance.randint(2, 3)
    if kind in ("disconnected", "abandoned", "late"):
        fields |= {"max_tokens": 200, "ignore_eos": True}
    if kind == "late":
        fields["deadline_s"] = chance.uniform(0.005, 0.1)
    if chat:
        return "/v1/chat/completions", {**fields, "messages": [{"role": "user", "content": text}]}
    return "/v1/completions", {**fields, "prompt": text}


def _outcome(kind: str, wrong: str, answer: HTTPResponse, chance: random.Random) -> tuple[str, str]:
    """Read an answer; what became of a request of this kind, and the body. `wrong` is the field that it must refuse."""
    if answer.status == 200 and kind == "disconnected":
        answer.read1(chance.randint(1, 2000))
        time.sleep(chance.random() * 0.1)
        return kind, ""
    body = answer.read().decode()
    if answer.status == 200:
        return _of_answer(kind, body), body
    error = json.loads(body)["error"]
    if answer.status == 429 and error["code"] == "queue_full" and answer.headers["Retry-After"]:
        time.sleep(float(answer.headers["Retry-After"]))  # as a client should
        return "busy", body
    expected = {
        "refused": (400, None),
        "late": (504, "deadline_exceeded"),
        "too long": (400, "context_length_exceeded"),
    }
    status, code = expected.get(kind, (200, None))
    named = error["param"] == wrong if kind == "refused" else error["code"] == code
    if kind == "refused" and wrong == "model":
        status = 404
    if answer.status != status or not named:
        raise RuntimeError(f"a request that is {kind} ({wrong or 'nothing wrong'}): {answer.status} {body[:400]!r}")
    return kind, body


def _of_answer(kind: str, body: str) -> str:
    """The outcome of an answer with status 200: whole, a stream, or a stream that its deadline ended."""
    if not body.startswith("data: "):
        if json.loads(body)["choices"][0]["finish_reason"] in ("stop", "length"):
            return "whole"
    elif body.endswith("data: [DONE]\n\n"):
        last = [json.loads(event.removeprefix("data: ")) for event in body.split("\n\n")[:-2]][-1]
        if "error" not in last:
            return "streamed"
        if kind == "late" and last["error"]["code"] == "deadline_exceeded":
            return "late"
    raise RuntimeError(f"a request that is {kind}: {body[-400:]!r}")


def _texts(body: str) -> list[str]:
    """The text of every choice of an answer, whole or streamed."""
    events = body.removesuffix("data: [DONE]\n\n").strip().split("\n\n")
    parts: dict[int, str] = {}
    for event in events:
        for choice in json.loads(event.removeprefix("data: "))["choices"]:
            said = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
            parts[choice["index"]] = parts.get(choice["index"], "") + (said.get("content") or "")
    return [parts[index] for index in sorted(parts)]


def idle(http: str) -> None:
    """Wait until nothing runs or waits any more; TimeoutError where that does not come."""
    end = time.monotonic() + TIMEOUT_S
    while busy := [(name, value) for name, value in metric_samples(http) if "num_requests_" in name and value]:
        if time.monotonic() > end:
            raise TimeoutError(f"requests have not ended: {busy}")
        time.sleep(0.05)


def ended_by_reason(http: str) -> dict[str, float]:
    """Requests that have ended, by the server's word for why."""
    total = "vllm:request_success_total"
    return {
        name.partition('finished_reason="')[2].partition('"')[0]: value
        for name, value in metric_samples(http)
        if name.startswith(total)
    }


def measure(
    http: str, *, requests: int, concurrency: int, seed: int, pid: int | None, alone: bool = False
) -> dict[str, Any]:
    """Run the load; the whole report. `even` says whether everything came out as it must."""
    load, outcomes, memory = ServeLoad(http, seed), Counter[str](), list[float]()
    idle(http)
    before, begin = counted(http), time.perf_counter()
    memory += [resident_mb(pid)] if pid else []
    numbers = range(requests)
    with ThreadPoolExecutor(concurrency) as pool:
        for part in range(ROUNDS):
            outcomes.update(pool.map(load.run, numbers[part * requests // ROUNDS : (part + 1) * requests // ROUNDS]))
            idle(http)
            memory += [resident_mb(pid)] if pid else []
    seconds = time.perf_counter() - begin
    time.sleep(SETTLE_S)
    idle(http)
    totals = {name: value - before[name] for name, value in counted(http).items()}
    # The server counts each choice of a request.
    accepted = sum(map(len, load.texts.values())) + sum(outcomes[kind] for kind in CUT_SHORT)
    even = (
        accepted <= totals["ended"] <= accepted + outcomes["abandoned"]
        and totals["observed"] == totals["ended"]
        and totals["observed_tokens"] == totals["tokens"]
        and outcomes.total() == requests
    )
    reasons = ended_by_reason(http)
    differ = load.differ_alone() if alone else []
    return {
        "requests": requests,
        "concurrency": concurrency,
        "seed": seed,
        "seconds": round(seconds, 1),
        "outcomes": dict(outcomes),
        "metrics": totals,
        "ended_by_reason": reasons,
        "rss_mb": memory,
        "asked_alone": len(load.texts) if alone else 0,
        "differ_alone": differ,
        "even": even and not differ,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the load and print one JSON document; exit code 1 where something does not come out even."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--http", default="127.0.0.1:8000")
    parser.add_argument("--pid", type=int, help="the server's process, for its memory")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--concurrency", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--alone", action="store_true", help="ask again for whole answers, alone: the same texts")
    document = measure(**vars(parser.parse_args(arguments)))
    print(json.dumps(document))
    return 0 if document["even"] else 1


if __name__ == "__main__":
    sys.exit(main())
