"""Which kernels the card's time goes to, by PyTorch's profiler: a prefill and a decode step of int8 and fp16."""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np

from starling.engine.bundle.manifest import Bundle
from starling.profiling.gpu.stages.kit import Kit
from starling.profiling.gpu.stages.throughput import POSITIONS

_MOST_KERNELS, _NAME_LENGTH = 14, 90
_PROMPT, _DECODE_AT = 1024, 128


def run(kit: Kit) -> None:
    """Decode steps are not captured, since a graph's kernels have no names."""
    if not kit.machine.is_card:
        kit.results.write(skipped="it is the card's own kernels that are timed")
        return
    for precision, kernels in (("int8-fp16", True), ("int8-fp16", False), ("fp16", False)):
        bundle = Bundle.open(kit.work / kit.large(precision))
        with kit.results.guarded(bundle=bundle.folder.name):
            _measure(kit, bundle, kernels)


def _measure(kit: Kit, bundle: Bundle, kernels: bool) -> None:
    backend = kit.machine.open(bundle, rows=1, positions=POSITIONS, capture=False, kernels=kernels)
    ids = np.arange(3, 3 + _PROMPT)
    try:
        what = {"bundle": bundle.folder.name, "kernels": backend.kernels}
        kit.results.write(**what, part=f"prefill of {_PROMPT}", **_timed(lambda: backend.prefill(0, ids, 0)))
        kit.results.write(**what, part="decode", **_timed(lambda: backend.decode([5], [_DECODE_AT])))
    finally:
        backend.close()
        gc.collect()


def _timed(work: Callable[[], object]) -> dict[str, object]:
    """Kernels with how often each ran and its milliseconds, the longest first."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    events = sorted(profiler.key_averages(), key=lambda event: -event.device_time_total)
    rows = [[event.key[:_NAME_LENGTH], event.count, round(event.device_time_total / 1e3, 3)] for event in events]
    return {
        "total_ms": round(sum(event.device_time_total for event in events) / 1e3, 3),
        "kernels_ms": rows[:_MOST_KERNELS],
    }
