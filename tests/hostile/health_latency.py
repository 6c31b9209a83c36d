"""How long `/health` takes while requests of a megabyte are refused: `python health_latency.py BUNDLE [--pin]`.

Not a test: it measures, and prints one JSON line. `--pin` keeps the server on the first core, so that another is free
for the clients. The prompts are of two kinds: one is refused by its length alone, the other only once it is tokens.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from http_server import MODEL, Server, serving

CLIENTS = 24
POLL_S = 0.01
PROMPTS = {
    "a megabyte, refused by its length": "ab " * 333_000,
    "60 kB, refused once it is tokens": "ab " * 20_000,
}


def refuse(server: Server, prompt: str) -> int:
    """One request for a completion; its status."""
    return server.request("POST", "/v1/completions", {"model": MODEL, "prompt": prompt, "max_tokens": 5})[0]


def measure(server: Server, prompt: str, rounds: int) -> dict[str, Any]:
    """Latencies of `/health` in milliseconds while `CLIENTS` requests at once are refused, `rounds` times each."""
    ended, latencies = Event(), []

    def poll() -> None:
        while not ended.is_set():
            begin = time.perf_counter()
            assert server.request("GET", "/health")[0] == 200
            latencies.append(1000 * (time.perf_counter() - begin))
            time.sleep(POLL_S)

    with ThreadPoolExecutor(CLIENTS + 1) as pool:
        poller = pool.submit(poll)
        begin = time.perf_counter()
        statuses = set(pool.map(lambda _: refuse(server, prompt), range(CLIENTS * rounds)))
        seconds = time.perf_counter() - begin
        ended.set()
        poller.result()
    latencies.sort()
    shares = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {
        "statuses": sorted(statuses),
        "requests": CLIENTS * rounds,
        "seconds": round(seconds, 2),
        "polls": len(latencies),
        "health_ms": {
            name: round(latencies[min(int(share * len(latencies)), len(latencies) - 1)], 1)
            for name, share in shares.items()
        },
    }


def main() -> None:
    """Start a server, and measure each kind of prompt."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--pin", action="store_true")
    parser.add_argument("--rounds", type=int, default=40)
    settings = parser.parse_args()
    cores = os.sched_getaffinity(0)
    if settings.pin:
        os.sched_setaffinity(0, {min(cores)})
    with serving(settings.bundle) as server:
        os.sched_setaffinity(0, cores - {min(cores)} if settings.pin else cores)
        for kind, prompt in PROMPTS.items():
            print(json.dumps({"prompt": kind} | measure(server, prompt, settings.rounds)), flush=True)


if __name__ == "__main__":
    main()
