"""Where a step's time goes: the time of every operator, by the part of the layer that it belongs to.

From ONNX Runtime's own profiler. What TensorRT's IProfiler reports, (layer name, milliseconds) for each step, can be
grouped by the same `group`; its backend does not offer it yet.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

from starling.engine.backend import PREFILL_CHUNK
from starling.engine.bundle import Bundle
from starling.engine.ort_backend import OrtBackend, choose_provider
from starling.engine.tokenizer import Tokenizer
from starling.profiling.graph_nodes import read_nodes
from starling.profiling.layer_parts import PARTS, LayerParts
from starling.profiling.prompts import prompt_tokens

#: Runs of each phase behind one that does not count.
PREFILLS, DECODES = 3, 24


class Kernel(NamedTuple):
    """One kernel of one run: its name, operator, and microseconds."""

    name: str
    operator: str
    us: float


@dataclass(frozen=True, slots=True)
class OperatorTime:
    """All kernels of one operator in one part: calls and milliseconds in a run."""

    part: str
    operator: str
    calls: float
    ms: float


@dataclass(frozen=True, slots=True)
class PhaseTime:
    """One phase: the median over its `runs` of what each operator took; `run_ms` the run as the profiler saw it.

    What `run_ms` has beyond the operators' sum is the executor's own time and the profiler's.
    """

    runs: int
    run_ms: float
    operators: tuple[OperatorTime, ...]

    @property
    def operators_ms(self) -> float:
        return sum(row.ms for row in self.operators)

    def by_part(self) -> dict[str, float]:
        """Milliseconds of each part that took any, in the order of a layer."""
        totals = {part: sum(row.ms for row in self.operators if row.part == part) for part in PARTS}
        return {part: ms for part, ms in totals.items() if ms > 0}


@dataclass(frozen=True, slots=True)
class OperatorProfile:
    """Prefill of one row's `prompt_tokens` tokens in one chunk, and decode of `batch` rows behind them."""

    prompt_tokens: int
    batch: int
    prefill: PhaseTime
    decode: PhaseTime


def profile_operators(bundle: Bundle, *, prompt: int, batch: int, threads: int, backend: str) -> OperatorProfile:
    """Open the bundle in a session of its own with ONNX Runtime's profiler on, and run both phases.

    The prompt is cut to one chunk, so that a prefill is one run of the graph. Raises BackendError as opening does.
    """
    prompt = min(prompt, PREFILL_CHUNK)
    tokens = np.array(prompt_tokens(Tokenizer.load(bundle.folder, bundle.architecture.vocab_size), prompt, 0), np.int64)
    with TemporaryDirectory(prefix="starling-profile-") as folder:
        running = OrtBackend(
            bundle,
            provider=choose_provider(bundle, backend),
            threads=threads,
            max_seq=prompt + DECODES + 1,
            max_batch=batch,
            prefill_chunk=prompt,
            profile_prefix=Path(folder) / "run",
        )
        try:
            for row in range(max(batch, PREFILLS + 1)):
                running.prefill(row % batch, tokens, 0)
            prefills = max(batch, PREFILLS + 1)
            for step in range(DECODES + 1):
                running.decode([int(tokens[step % prompt])] * batch, [prompt + step] * batch)
            events = json.loads(running.end_profiling().read_text())
        finally:
            running.close()
    runs = _runs(events)
    parts = LayerParts(read_nodes(running.graph_path))
    return OperatorProfile(prompt, batch, group(runs[1:prefills], parts), group(runs[prefills + 1 :], parts))


class _ProfiledRun(NamedTuple):
    ms: float
    kernels: list[Kernel]


def _runs(events: list[dict[str, object]]) -> list[_ProfiledRun]:
    """The runs of the model in a file of ONNX Runtime's profiler (Chrome's trace format), in their order."""
    runs: list[_ProfiledRun] = []
    kernels: list[Kernel] = []
    for event in events:
        name, args = str(event["name"]), event.get("args")
        if event.get("cat") == "Node" and name.endswith("_kernel_time") and isinstance(args, dict):
            kernels.append(Kernel(name.removesuffix("_kernel_time"), str(args["op_name"]), float(str(event["dur"]))))
        elif name == "model_run":  # written when the run is over, behind its kernels
            runs.append(_ProfiledRun(float(str(event["dur"])) / 1e3, kernels))
            kernels = []
    return runs


def group(runs: Iterable[tuple[float, list[Kernel]]], parts: LayerParts) -> PhaseTime:
    """The median over the runs, each (milliseconds, kernels), of every operator's time in every part."""
    listed = list(runs)
    times: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0] * len(listed))
    calls: dict[tuple[str, str], int] = defaultdict(int)
    for number, (_, kernels) in enumerate(listed):
        for kernel in kernels:
            key = parts.part(kernel.name, kernel.operator), kernel.operator
            times[key][number] += kernel.us / 1e3
            calls[key] += 1
    rows = [OperatorTime(*key, calls[key] / len(listed), median(values)) for key, values in times.items()]
    rows.sort(key=lambda row: (PARTS.index(row.part), -row.ms))
    return PhaseTime(len(listed), median(ms for ms, _ in listed), tuple(rows))
