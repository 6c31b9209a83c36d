"""Where a step's time goes: the time of every operator, by the part of the layer that it belongs to.

A profiler of the runtime times the kernels; what is here runs both phases and adds the kernels up.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple, Protocol, TypeVar

from starling.engine.backends.backend import Backend, Tokens
from starling.profiling.operators.layer_parts import PARTS

Kernels = TypeVar("Kernels")

#: Runs of each phase after one that does not count.
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
    """One phase of `runs` runs: `run_ms` the median of what the profiler saw a run take, and the operators' part of it.

    What `run_ms` has beyond the operators' sum is the executor's own time and the profiler's. The sum is above `run_ms`
    only where operators run side by side, as a GPU's may.
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
    """Prefill of one row's `prompt_tokens` tokens in one run, and decode of `batch` rows after them."""

    profiler: str
    prompt_tokens: int
    batch: int
    prefill: PhaseTime
    decode: PhaseTime


def run_phases(backend: Backend, tokens: Tokens, batch: int) -> int:
    """Prefill `tokens` int64 [n], one run each, then decode `batch` rows after them; how many runs were prefills.

    Each phase's first run does not count. At the cache's end a row stays at its last position.
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
    """What every operator of every part takes in the median run; each run is (milliseconds, kernels).

    Its time is its mean share of the middle half of the runs, by their length, times the median run. A median of each
    operator alone would not add up: on a busy machine different runs are slow in different operators, and the sum of
    the medians lies far below the median run, or above it.
    """
    listed = [(ms, [((parts.part(name, operator), operator), us) for name, operator, us in run]) for ms, run in runs]
    run_ms, middle = median(ms for ms, _ in listed), _middle_half(listed)
    times: dict[tuple[str, str], float] = defaultdict(float)
    for ms, kernels in middle:
        for key, us in kernels:
            times[key] += us / 1e3 / ms * run_ms / len(middle)
    calls = Counter(key for _, kernels in listed for key, _ in kernels)
    rows = [OperatorTime(*key, count / len(listed), times[key]) for key, count in calls.items()]
    rows.sort(key=lambda row: (PARTS.index(row.part), -row.ms))
    return PhaseTime(len(listed), run_ms, tuple(rows))


def _middle_half(runs: Sequence[tuple[float, Kernels]]) -> list[tuple[float, Kernels]]:
    """The runs without the fastest and the slowest quarter; at least one."""
    left_out = len(runs) // 4 if len(runs) > 3 else (len(runs) - 1) // 2
    return sorted(runs, key=lambda run: run[0])[left_out : len(runs) - left_out]
