"""The measuring itself: contenders take turns, one at a time, and every repeat changes who goes first."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from starling.engine.errors import BackendError
from starling.profiling.peers.worker_process import WorkerProcess

Turn = TypeVar("Turn")

#: Thread pools go on spinning for some 50 ms after a run; the next contender starts when they have gone to sleep.
SETTLE_S = 0.25
#: Enough for a compiled peer to record its graphs, too.
WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Run:
    """One generation by one contender. Times in milliseconds."""

    contender: str
    prompt_tokens: int
    repeat: int
    setup_ms: float
    ttft_ms: float
    itl_p50_ms: float
    itl_p99_ms: float
    decode_tokens_per_s: float
    tokens: tuple[int, ...]
    peak_rss_bytes: int | None
    #: CPU time that the other contenders, who should be asleep, used during this run.
    others_cpu_ms: float


def measure(
    workers: Sequence[WorkerProcess],
    prompts: Callable[[int, int], list[int]],
    lengths: Sequence[int],
    new_tokens: int,
    repeats: range,
    progress: Callable[[str], None],
) -> list[Run]:
    """Every contender on every prompt length, once for each of `repeats`, after one warm-up run of each.

    `prompts(length, start)` gives the token ids, the same for all contenders, with no beginning shared between
    starts: a peer that caches prefixes must find none. Raises BackendError when a worker fails, or gives fewer or more
    tokens than were asked for.
    """
    runs = []
    for index, length in enumerate(lengths):
        for worker in workers:
            progress(f"warming up {worker.name} on {length} tokens")
            worker.request(op="run", prompt=prompts(length, -1 - index), new_tokens=WARM_UP_TOKENS)
        for repeat in repeats:
            prompt = prompts(length, repeat * len(lengths) + index)
            for worker in turns(workers, repeat):
                progress(f"{length} prompt tokens, repeat {repeat + 1} of {repeats.stop}: {worker.name}")
                runs.append(_run(worker, workers, prompt, new_tokens, repeat))
    return runs


def turns(workers: Sequence[Turn], repeat: int) -> Sequence[Turn]:
    """The order of one repeat: A B C, then C B A, so that slow drifts of the machine cancel out."""
    return workers[::-1] if repeat % 2 else workers


def _run(
    worker: WorkerProcess, workers: Sequence[WorkerProcess], prompt: list[int], new_tokens: int, repeat: int
) -> Run:
    others = [other for other in workers if other is not worker]
    time.sleep(SETTLE_S)
    before = _cpu_ms(others)
    reply = worker.request(op="run", prompt=prompt, new_tokens=new_tokens)
    others_cpu_ms = _cpu_ms(others) - before
    if len(reply["tokens"]) != new_tokens:
        raise BackendError(
            f"{worker.name}: gave {len(reply['tokens'])} tokens instead of {new_tokens}; "
            "choose fewer --new-tokens or --prompt-tokens, within the model's context"
        )
    return to_run(worker.name, len(prompt), repeat, reply, others_cpu_ms)


def _cpu_ms(workers: Sequence[WorkerProcess]) -> float:
    return sum(float(worker.request(op="cpu")["cpu_ms"]) for worker in workers)


def to_run(contender: str, prompt_tokens: int, repeat: int, reply: dict[str, Any], others_cpu_ms: float) -> Run:
    """The figures of a worker's reply. Decode tokens per second leave the first token, which is prefill, out."""
    gaps = np.array(reply["itl_ms"], np.float64)
    return Run(
        contender=contender,
        prompt_tokens=prompt_tokens,
        repeat=repeat,
        setup_ms=reply["setup_ms"],
        ttft_ms=reply["ttft_ms"],
        itl_p50_ms=float(np.percentile(gaps, 50)),
        itl_p99_ms=float(np.percentile(gaps, 99)),
        decode_tokens_per_s=len(gaps) * 1e3 / float(gaps.sum()),
        tokens=tuple(reply["tokens"]),
        peak_rss_bytes=reply["peak_rss_bytes"],
        others_cpu_ms=others_cpu_ms,
    )
