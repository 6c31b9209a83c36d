"""Memory that a block gains lies on huge pages after it, its contents unchanged, within a bounded time."""

import mmap
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from starling.engine.backends.onnxruntime.huge_pages import HUGE_PAGE, anonymous_ranges, collapse, huge_pages

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="huge pages are asked for on Linux only")
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_bytes() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024
    return 0


def written_memory(huge_page_count: int) -> mmap.mmap:
    memory = mmap.mmap(-1, huge_page_count * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    np.frombuffer(memory, np.uint8)[:] = 7
    return memory


def test_new_memory_is_collapsed_and_keeps_its_contents() -> None:
    if not THP.exists() or "[never]" in THP.read_text():
        pytest.skip("this kernel gives no transparent huge pages")
    before = huge_bytes()
    with huge_pages():
        memory = written_memory(8)
    if huge_bytes() == before:
        pytest.skip("this kernel cannot collapse memory on request (Linux 6.1 and newer do)")
    assert huge_bytes() - before >= 4 * HUGE_PAGE
    assert (np.frombuffer(memory, np.uint8) == 7).all()


def test_a_passed_deadline_stops_it() -> None:
    memory = written_memory(4)
    start = np.frombuffer(memory, np.uint8).ctypes.data
    assert collapse(start, start + 4 * HUGE_PAGE, time.monotonic() - 1) == 0


def test_ranges_hold_the_memory_of_this_process() -> None:
    memory = written_memory(2)
    address = np.frombuffer(memory, np.uint8).ctypes.data
    assert any(start <= address < stop for start, stop in anonymous_ranges())
