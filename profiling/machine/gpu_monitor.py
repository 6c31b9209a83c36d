"""What an NVIDIA GPU does while it is measured: memory, clocks, power, energy, by NVML (package nvidia-ml-py).

Run on an NVIDIA H200.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from threading import Event, Thread
from typing import Any

from starling.profiling.distribution import Distribution, distribution
from starling.profiling.machine.peaks import CPU_PROVIDER

#: NVML refreshes power about every 20 to 100 ms; asking more often would only cost the host time.
SAMPLE_S = 0.05
# nvml.h: NVML_CLOCK_SM, NVML_CLOCK_MEM.
_CLOCK_SM, _CLOCK_MEMORY = 1, 2


@dataclass(frozen=True, slots=True)
class GpuUse:
    """One GPU over the measured runs. Clocks in MHz, power in W, memory in bytes, energy in joules."""

    name: str
    samples: int
    memory_used_peak_bytes: int
    memory_total_bytes: int
    sm_clock_mhz: Distribution
    memory_clock_mhz: Distribution
    power_w: Distribution
    #: By the GPU's own energy counter (Volta and newer); None where it has none.
    energy_j: float | None
    energy_j_per_token: float | None


@dataclass(slots=True)
class GpuWatch:
    """Samples a GPU in a thread of its own from `begin` on; without a device it does nothing."""

    nvml: Any = None
    device: Any = None
    _rows: list[tuple[int, int, int, float]] = field(default_factory=list)
    _energy_mj: int | None = None
    _end: Event = field(default_factory=Event)
    _thread: Thread | None = None

    def begin(self) -> None:
        """Forget what came before, and sample from now on."""
        if self.device is None:
            return
        self._energy_mj = self._energy()
        self._thread = Thread(target=self._sample, name="gpu-watch", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop sampling."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()

    def use(self, tokens: int) -> GpuUse | None:
        """What was seen while `tokens` tokens were generated; None without a GPU or a sample."""
        if not self._rows:
            return None
        memory, sm_clock, memory_clock, power = zip(*self._rows, strict=True)
        end = self._energy()
        joules = None if self._energy_mj is None or end is None else (end - self._energy_mj) / 1e3
        return GpuUse(
            name=_text(self.nvml.nvmlDeviceGetName(self.device)),
            samples=len(self._rows),
            memory_used_peak_bytes=max(memory),
            memory_total_bytes=int(self.nvml.nvmlDeviceGetMemoryInfo(self.device).total),
            sm_clock_mhz=distribution(sm_clock),
            memory_clock_mhz=distribution(memory_clock),
            power_w=distribution(power),
            energy_j=joules,
            energy_j_per_token=None if joules is None else joules / tokens,
        )

    def _sample(self) -> None:
        nvml, device = self.nvml, self.device
        while True:
            self._rows.append(
                (
                    int(nvml.nvmlDeviceGetMemoryInfo(device).used),
                    nvml.nvmlDeviceGetClockInfo(device, _CLOCK_SM),
                    nvml.nvmlDeviceGetClockInfo(device, _CLOCK_MEMORY),
                    nvml.nvmlDeviceGetPowerUsage(device) / 1e3,
                )
            )
            if self._end.wait(SAMPLE_S):
                return

    def _energy(self) -> int | None:
        """Millijoules since the driver was loaded."""
        try:
            return int(self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.device))
        except self.nvml.NVMLError:
            return None


@contextmanager
def watch_gpu(provider: str) -> Iterator[GpuWatch]:
    """A watch on the GPU in use; one that sees nothing where `provider` is the CPU's, or nvidia-ml-py is missing."""
    nvml = None if provider == CPU_PROVIDER else _open_nvml()
    if nvml is None:
        yield GpuWatch()
        return
    watch = GpuWatch(nvml, _first_visible(nvml))
    try:
        yield watch
    finally:
        watch.end()


def _open_nvml() -> Any:
    """The module pynvml, initialised; None where it, the driver or a GPU is missing."""
    try:
        nvml = import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        return nvml if nvml.nvmlDeviceGetCount() else None
    except nvml.NVMLError:
        return None


def _first_visible(nvml: Any) -> Any:
    """The device that is CUDA's first, by CUDA_VISIBLE_DEVICES, which NVML does not read.

    Its numbers are NVML's where all GPUs of the machine are alike, or CUDA_DEVICE_ORDER is PCI_BUS_ID.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    if named.startswith(("GPU-", "MIG-")):
        return nvml.nvmlDeviceGetHandleByUUID(named)
    return nvml.nvmlDeviceGetHandleByIndex(int(named) if named.isdigit() else 0)


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
