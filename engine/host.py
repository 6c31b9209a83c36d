"""This computer: its threads and memory as far as this process may use them, and the user's cache folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from starling.engine.cgroup import cpu_quota, memory_left


def default_threads() -> int:
    """Physical cores that this process may run on: hyper-threads share the units that a matrix product needs.

    No more than its container's CPU quota: threads beyond it would be stopped for the rest of each period.
    """
    quota = cpu_quota()
    cores = _physical_cores()
    return cores if quota is None else max(min(cores, int(quota)), 1)


def _physical_cores() -> int:
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cpus = os.sched_getaffinity(0)
    return len({_siblings(cpu) for cpu in cpus}) or 1


def _siblings(cpu: int) -> str:
    try:
        with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return str(cpu)


def total_memory() -> int:
    """Bytes of memory of this computer; 0 where the system does not say (Windows)."""
    if not hasattr(os, "sysconf"):
        return 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_memory() -> int:
    """Bytes that can be taken without swapping, in this container: MemAvailable where Linux says it, else all."""
    left = memory_left()
    return _host_memory() if left is None else min(_host_memory(), left)


def _host_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return total_memory()


def cache_folder() -> Path:
    """Where this user's programs keep what they can make again: $XDG_CACHE_HOME, or the system's usual place."""
    named = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    return (Path(named) if named else Path.home() / ".cache") / "starling"
