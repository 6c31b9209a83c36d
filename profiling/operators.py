"""Where a step's time goes: the time of every operator, by the part of the layer that it belongs to.

A profiler of the runtime times the kernels; what is here runs both phases and adds the kernels up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple, Protocol

from starling.engine.backend import Backend, Tokens
from starling.profiling.layer_parts import PARTS

#: Runs of each phase behind one that does not count.
PREFILLS, DECODES = 3, 24


class Kernel(NamedTuple):
    """One kernel of one run: its name, operator, and microseconds."""

    name: str
    operator: str
    us: float


class ProfiledRun(NamedTuple):
    """One run of the model: milliseconds as the profiler saw it, and its kernels."""

    ms: float
    kernels: list[Kernel]


class KernelParts(Protocol):
    """Says to which of PARTS a kernel belongs, by the name that a profiler gives it."""

    def part(self, kernel: str, operator: str) -> str: ...


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
    """Prefill of one row's `prompt_tokens` tokens in one run, and decode of `batch` rows behind them."""

    profiler: str
    prompt_tokens: int
    batch: int
    prefill: PhaseTime
    decode: PhaseTime


def run_phases(backend: Backend, tokens: Tokens, batch: int) -> int:
    """Prefill `tokens` int64 [n], one run each, then decode `batch` rows behind them; how many runs were prefills.

    Each phase's first run does not count. Behind the cache's end a row stays at its last position.
    """
    prefills = max(batch, PREFILLS + 1)
    for row in range(prefills):
        backend.prefill(row % batch, tokens, 0)
    for step in range(DECODES + 1):
        position = min(len(tokens) + step, backend.max_seq - 1)
        backend.decode([int(tokens[step % len(tokens)])] * batch, [position] * batch)
    return prefills


def by_phase(runs: Sequence[ProfiledRun], prefills: int, parts: KernelParts) -> tuple[PhaseTime, PhaseTime]:
    """Prefill and decode of what `run_phases` ran."""
    return group(runs[1:prefills], parts), group(runs[prefills + 1 :], parts)


def group(runs: Iterable[tuple[float, list[Kernel]]], parts: KernelParts) -> PhaseTime:
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
