"""GPU figures beside a profile: what NVML says of memory, clocks, power and energy, with a stand-in for the driver."""

import sys
from time import sleep
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from starling.profiling.machine.gpu_monitor import SAMPLE_S, watch_gpu

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


class Driver(ModuleType):
    """pynvml for one GPU of 80 GB that draws 250 W and whose energy counter moves 5 J a reading."""

    class NVMLError(Exception):
        """As pynvml's."""

    def __init__(self, gpus: int = 1, *, counts_energy: bool = True) -> None:
        super().__init__("pynvml")
        self.gpus, self.counts_energy, self.millijoules = gpus, counts_energy, 1000

    def nvmlInit(self) -> None:
        if not self.gpus:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:
        return self.gpus

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, name: str) -> str:
        return name

    def nvmlDeviceGetName(self, device: int | str) -> str:
        return "NVIDIA Test" if device == 0 else f"NVIDIA {device}"

    def nvmlDeviceGetMemoryInfo(self, device: int) -> SimpleNamespace:
        return SimpleNamespace(total=80_000_000_000, used=3_000_000_000)

    def nvmlDeviceGetClockInfo(self, device: int, kind: int) -> int:
        return {1: 1410, 2: 1593}[kind]

    def nvmlDeviceGetPowerUsage(self, device: int) -> int:
        return 250_000

    def nvmlDeviceGetTotalEnergyConsumption(self, device: int) -> int:
        if not self.counts_energy:
            raise self.NVMLError("Not Supported")
        self.millijoules += 5000
        return self.millijoules


def watched(monkeypatch: pytest.MonkeyPatch, driver: ModuleType | None, provider: str = CUDA) -> Any:
    monkeypatch.setitem(sys.modules, "pynvml", driver)  # None: importing it fails
    with watch_gpu(provider) as gpu:
        gpu.begin()
        sleep(2.5 * SAMPLE_S)
    return gpu.use(tokens=10)


def test_units_are_bytes_megahertz_watts_and_joules(monkeypatch: pytest.MonkeyPatch) -> None:
    use = watched(monkeypatch, Driver())
    assert use.samples >= 2
    assert (use.name, use.memory_used_peak_bytes, use.memory_total_bytes) == ("NVIDIA Test", 3e9, 80e9)
    assert (use.sm_clock_mhz.mean, use.memory_clock_mhz.mean, use.power_w.mean) == (1410, 1593, 250)
    assert (use.energy_j, use.energy_j_per_token) == (5, 0.5)


@pytest.mark.parametrize(
    ("visible", "name"),
    [("", "NVIDIA Test"), ("2,0", "NVIDIA 2"), ("GPU-5ab,0", "NVIDIA GPU-5ab"), ("MIG-7", "NVIDIA MIG-7")],
)
def test_the_gpu_is_the_one_that_cuda_sees_first(visible: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert watched(monkeypatch, Driver(gpus=3)).name == name


def test_a_gpu_without_an_energy_counter_gives_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    use = watched(monkeypatch, Driver(counts_energy=False))
    assert (use.energy_j, use.energy_j_per_token) == (None, None)
    assert use.power_w.p50 == 250


@pytest.mark.parametrize(
    ("driver", "provider"),
    [(None, CUDA), (Driver(gpus=0), CUDA), (Driver(), CPU)],
    ids=["no package", "no driver", "on the CPU"],
)
def test_without_a_gpu_there_is_nothing_to_say(
    driver: ModuleType | None, provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert watched(monkeypatch, driver, provider) is None
