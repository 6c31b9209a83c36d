"""How much of the machine's memory bandwidth a decode step reaches: the limit of batch 1 decoding."""

from __future__ import annotations

from dataclasses import dataclass

from starling.engine.bundle import Bundle
from starling.profiling.memory_bandwidth import measure_read_bandwidth


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """What a decode step reads and how fast, beside what the machine can read; bytes, and bytes per second."""

    weight_bytes_per_step: int
    #: Keys and values of all rows that a step attends to, averaged over the steps.
    live_kv_bytes_per_step: int
    reached: float
    machine: float

    @property
    def share(self) -> float:
        """Part of the machine's bandwidth that was reached; above 1 where the weights fit into its caches."""
        return self.reached / self.machine


def decode_bandwidth(
    bundle: Bundle, *, prompt_tokens: int, new_tokens: int, batch: int, steps_per_second: float, threads: int
) -> Bandwidth:
    """Measure the machine with `threads` threads, and compare: bytes of a step x steps per second."""
    weights = bundle.weights.bytes_per_token
    live = live_kv_bytes(bundle, prompt_tokens, new_tokens) * batch
    return Bandwidth(weights, live, (weights + live) * steps_per_second, measure_read_bandwidth(threads))


def live_kv_bytes(bundle: Bundle, prompt_tokens: int, new_tokens: int) -> int:
    """Bytes of one row's cache that a decode step reads on average; decode k of n-1 attends to prompt + k positions."""
    window = bundle.architecture.sliding_window or prompt_tokens + new_tokens
    lengths = [min(prompt_tokens + step, window) for step in range(1, new_tokens)]
    return round(bundle.kv_cache.bytes_per_token * sum(lengths) / len(lengths))
