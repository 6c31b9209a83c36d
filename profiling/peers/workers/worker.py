"""The worker program: `python worker.py MODULE` serves one runtime over stdin and stdout.

The protocol is described in the docstring of `starling.profiling.peers`. Runs as a plain script in a peer's own
environment, so it imports the standard library only, and NumPy once logits are asked for.
"""

import importlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TextIO, runtime_checkable

#: Called with each token as soon as it is known.
Arrived = Callable[[int], None]
#: Takes the next tokens of a sequence; the logits after the last of them, float [vocab].
Feed = Callable[[list[int]], Any]


@dataclass(frozen=True, slots=True)
class Setup:
    """How a model is opened. `capacity` is the tokens of one run, prompt and new; `device` is cpu or cuda.

    `settings` are the runtime's own, as the peer's list in `catalogue.py` gives them.
    """

    model: str
    threads: int
    capacity: int
    device: str
    settings: dict[str, Any]


class Worker(Protocol):
    """What the module of a runtime offers, as a class named `Worker` that takes no arguments."""

    def open(self, setup: Setup) -> dict[str, str]:
        """Load a model; versions by package."""
        ...

    def start(self, prompt: list[int], new_tokens: int) -> Callable[[Arrived], None]:
        """Allocate what one run needs; the run itself, to be called once.

        It gives `new_tokens` greedy tokens, whatever they are, and computes nothing before it is called.
        """
        ...

    def begin(self) -> Feed:
        """An empty sequence of up to `capacity` tokens; at most one is in use."""
        ...


@runtime_checkable
class Batching(Protocol):
    """What the module of a runtime offers that answers several prompts together, with `Worker.open`."""

    def answer_all(self, prompts: list[list[int]], new_tokens: int, arrived: Callable[[int, int], None]) -> None:
        """Give `new_tokens` greedy tokens to each prompt, all at once: `arrived` with the prompt's number and each."""
        ...


def answer(worker: Worker, request: dict[str, Any]) -> dict[str, Any]:
    """The reply to one request."""
    operation = request.pop("op")
    if operation == "open":
        start = time.perf_counter()
        versions = worker.open(Setup(**request))
        return {"load_ms": _ms_since(start), "versions": {"python": sys.version.split()[0], **versions}}
    if operation == "run":
        return run(worker, **request)
    if operation == "streams" and isinstance(worker, Batching):
        return {"streams": run_together(worker, **request)}
    if operation == "logits":
        return write_logits(worker, **request)
    if operation == "cpu":
        return {"cpu_ms": time.process_time() * 1e3}
    raise ValueError(f"unknown op {operation!r}")


def run(worker: Worker, prompt: list[int], new_tokens: int) -> dict[str, Any]:
    """Time one generation by the arrival of its tokens."""
    tokens: list[int] = []
    stamps: list[float] = []

    def arrived(token: int) -> None:
        stamps.append(time.perf_counter())
        tokens.append(token)

    start = time.perf_counter()
    generate = worker.start(prompt, new_tokens)
    stamps.append(time.perf_counter())
    generate(arrived)
    gaps = [(after - before) * 1e3 for before, after in itertools.pairwise(stamps)]
    return {
        "setup_ms": (stamps[0] - start) * 1e3,
        "ttft_ms": gaps[0],
        "itl_ms": gaps[1:],
        "tokens": tokens,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def run_together(worker: Batching, prompts: list[list[int]], new_tokens: int) -> list[dict[str, Any]]:
    """Time the answers to all prompts by the arrival of their tokens."""
    streams: list[dict[str, Any]] = [{"arrivals_ms": [], "tokens": []} for _ in prompts]
    start = time.perf_counter()

    def arrived(number: int, token: int) -> None:
        streams[number]["arrivals_ms"].append(_ms_since(start))
        streams[number]["tokens"].append(token)

    worker.answer_all(prompts, new_tokens, arrived)
    return streams


def write_logits(worker: Worker, tokens: list[list[int]], context: int, file: str) -> dict[str, Any]:
    """Write the logits after tokens context - 1 … window - 2 of each row, as
    `profiling/quality/stored_logits.py` reads them.

    A row's first `context` tokens are prefilled and its others decoded one by one, so that the figures are of the
    kernels and the KV cache of generation.
    """
    import numpy as np

    logits = np.array([_teacher_forced(worker.begin(), row, context) for row in tokens], np.float32)
    with open(file, "wb") as target:
        np.savez(target, tokens=np.array(tokens, np.int64), context=np.int64(context), logits=logits)
    return {"shape": list(logits.shape)}


def _teacher_forced(feed: Feed, row: list[int], context: int) -> list[Any]:
    return [feed(piece) for piece in (row[:context], *([token] for token in row[context:-1]))]


def peak_rss_bytes() -> int | None:
    """Peak resident memory of this process in bytes, or None where the system has no /proc."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except OSError:
        return None


def serve(worker: Worker, requests: TextIO, replies: TextIO) -> None:
    """Answer requests until the stream ends."""
    for line in requests:
        try:
            reply = answer(worker, json.loads(line))
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        print(json.dumps(reply), file=replies, flush=True)


def _ms_since(start: float) -> float:
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    # Native libraries print to file descriptor 1: keep the protocol on a private one and send the rest to stderr.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(importlib.import_module(sys.argv[1]).Worker(), sys.stdin, replies)


if __name__ == "__main__":
    main()
