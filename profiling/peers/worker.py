"""The worker program: `python worker.py MODULE` serves one runtime over stdin and stdout (protocol: package docstring).

Runs as a plain script in a peer's own environment, so it imports the standard library only.
"""

import importlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, Protocol, TextIO


class Worker(Protocol):
    """What the module of a runtime offers, as a class named `Worker` that takes no arguments."""

    def open(self, model: str, threads: int, capacity: int) -> dict[str, str]:
        """Load the folder `model` for runs of up to `capacity` tokens (prompt and new); versions by package."""
        ...

    def start(self, prompt: list[int], new_tokens: int) -> Iterator[int]:
        """Allocate what one run needs; its greedy tokens, `new_tokens` of them whatever they are, each once known.

        Nothing is computed before the first token is asked for.
        """
        ...


def answer(worker: Worker, request: dict[str, Any]) -> dict[str, Any]:
    """The reply to one request."""
    operation = request.pop("op")
    if operation == "open":
        start = time.perf_counter()
        versions = worker.open(**request)
        return {"load_ms": _ms_since(start), "versions": {"python": sys.version.split()[0], **versions}}
    if operation == "run":
        return run(worker, **request)
    if operation == "cpu":
        return {"cpu_ms": time.process_time() * 1e3}
    raise ValueError(f"unknown op {operation!r}")


def run(worker: Worker, prompt: list[int], new_tokens: int) -> dict[str, Any]:
    """Time one generation by the arrival of its tokens."""
    start = time.perf_counter()
    arriving = worker.start(prompt, new_tokens)
    setup_ms = _ms_since(start)
    tokens: list[int] = []
    stamps = [time.perf_counter()]
    for token in arriving:
        stamps.append(time.perf_counter())
        tokens.append(token)
    gaps = [(after - before) * 1e3 for before, after in itertools.pairwise(stamps)]
    return {
        "setup_ms": setup_ms,
        "ttft_ms": gaps[0],
        "itl_ms": gaps[1:],
        "tokens": tokens,
        "peak_rss_bytes": peak_rss_bytes(),
    }


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
