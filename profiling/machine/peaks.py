"""The roof of this machine: its memory bandwidth and its arithmetic peak, measured beside the model."""

from __future__ import annotations

from dataclasses import dataclass

from starling.engine.backends.backend import CUDA
from starling.engine.backends.cuda.cuda_device import CudaDevice
from starling.engine.backends.cuda.cuda_runtime import CudaRuntime
from starling.engine.backends.onnxruntime.cpu_session import import_onnxruntime
from starling.engine.backends.onnxruntime.cuda_session import load_cuda
from starling.engine.bundle.manifest import Bundle
from starling.profiling.machine.arithmetic import ArithmeticPeak, measure_arithmetic_peak, measure_cuda_peak
from starling.profiling.machine.memory_bandwidth import measure_copy_bandwidth, measure_read_bandwidth

CPU_PROVIDER = "CPUExecutionProvider"
READ_HOW = "NumPy int32 maximum over 256 MiB, each thread its own part, best of 15 passes"
COPY_HOW = "copies of 512 MiB inside the GPU's memory, read and written bytes, best of 5 passes"


@dataclass(frozen=True, slots=True)
class MachinePeaks:
    """Memory bandwidth in bytes per second, arithmetic in operations per second, and how each was measured."""

    read_bytes_per_second: float
    read_how: str
    arithmetic: ArithmeticPeak


def measure_peaks(bundle: Bundle, provider: str, threads: int) -> MachinePeaks | None:
    """Measure with `threads` threads on the CPU, or on the first GPU; None where TensorRT runs the bundle.

    Raises BackendError where the GPU has no room for what is measured.
    """
    if provider == CUDA:
        ort = import_onnxruntime()
        load_cuda(ort)
        bandwidth = measure_copy_bandwidth(CudaDevice(CudaRuntime()))
        return MachinePeaks(bandwidth, COPY_HOW, measure_cuda_peak(ort))
    if provider != CPU_PROVIDER:
        return None
    return MachinePeaks(measure_read_bandwidth(threads), READ_HOW, measure_arithmetic_peak(bundle, threads))
