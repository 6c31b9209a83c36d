"""The roof of this machine: its memory bandwidth and its arithmetic peak, measured beside the model."""

from __future__ import annotations

from dataclasses import dataclass

from starling.engine.bundle.manifest import Bundle
from starling.profiling.machine.arithmetic import ArithmeticPeak, measure_arithmetic_peak
from starling.profiling.machine.memory_bandwidth import measure_read_bandwidth

CPU_PROVIDER = "CPUExecutionProvider"
READ_HOW = "NumPy int32 maximum over 256 MiB, each thread its own part, best of 15 passes"


@dataclass(frozen=True, slots=True)
class MachinePeaks:
    """Read bandwidth in bytes per second, arithmetic in operations per second, and how each was measured."""

    read_bytes_per_second: float
    read_how: str
    arithmetic: ArithmeticPeak


def measure_peaks(bundle: Bundle, provider: str, threads: int) -> MachinePeaks | None:
    """Measure with `threads` threads; None where the provider is not the CPU's, whose memory is not measured yet."""
    if provider != CPU_PROVIDER:
        return None
    return MachinePeaks(measure_read_bandwidth(threads), READ_HOW, measure_arithmetic_peak(bundle, threads))
