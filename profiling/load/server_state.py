"""What a server under load shows of itself: its metrics page, and the memory of its processes."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path

TIMEOUT_S = 120.0


def metric_samples(address: str) -> list[tuple[str, float]]:
    """Every sample of the metrics page at "host:port": its name with its labels, and its value."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=TIMEOUT_S) as answer:
        lines = answer.read().decode().splitlines()
    return [(name, float(value)) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")]


def counted(metrics: str) -> dict[str, float]:
    """Generated tokens and ended requests by the metrics page: its counters, and its histograms of requests."""
    samples = metric_samples(metrics)
    totals = {
        "tokens": "vllm:generation_tokens_total",
        "ended": "vllm:request_success_total",
        "observed": "vllm:request_generation_tokens_count",
        "observed_tokens": "vllm:request_generation_tokens_sum",
    }
    return {key: sum(value for name, value in samples if name.startswith(total)) for key, total in totals.items()}


def resident_mb(pid: int) -> float:
    """Resident memory of a process and its descendants, in MB."""
    return sum(_status_kb(one) for one in _tree(pid)) / 1e3


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from _tree(int(child))


def _status_kb(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("VmRSS")), 0)
