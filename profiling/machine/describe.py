"""What this machine is, and what this process took of its memory; Linux tells most, other systems less."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from starling.engine.host import available_memory, default_threads, total_memory

#: Flags of /proc/cpuinfo by which kernels are chosen, in the order of their age: x86, then ARM.
ISA_FLAGS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)


@dataclass(frozen=True, slots=True)
class Machine:
    """Processor and memory. `logical_cpus` are those that this process may use; memory in bytes."""

    cpu: str
    physical_cores: int
    logical_cpus: int
    isa: tuple[str, ...]
    memory_bytes: int
    memory_available_bytes: int


def describe_machine() -> Machine:
    """Look at the machine."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        cpu=info.get("model name") or platform.processor() or platform.machine(),
        physical_cores=default_threads(),
        logical_cpus=usable,
        isa=tuple(flag for flag in ISA_FLAGS if flag in flags),
        memory_bytes=total_memory(),
        memory_available_bytes=available_memory(),
    )


def peak_rss_bytes() -> int:
    """The most memory that this process had resident so far, in bytes; 0 where the system does not say (Windows)."""
    # Linux hands a parent's ru_maxrss down through exec, so a small process of a large one would report the large one.
    own = _kibibytes(Path("/proc/self/status"), "VmHWM")
    if own is not None:
        return own
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@cache
def _cpuinfo() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo, {} where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    lines = text.partition("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _kibibytes(file: Path, name: str) -> int | None:
    """The value of a line `name: 123 kB`, in bytes; None where the system has no such file."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), None)
