"""Put a model's weights on 2 MiB pages, where Linux lets a process ask for them.

A decode step reads every weight once, so with 4 KiB pages it misses the TLB every 4 KiB. The runtime allocates without
asking for huge pages; what it allocated is collapsed into them afterwards. Measured on SmolLM2-135M, 2 cores of a
virtual machine, before and after in one process: fp32 and int8 decode steps 7 to 11 % shorter.
"""

import ctypes
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

HUGE_PAGE = 2 * 2**20
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25  # linux/mman.h; collapsing at once needs Linux 6.1
#: Collapsing copies memory at about 1 GB/s, so a large model would wait for it: the rest stays on small pages.
BUDGET_S = 1.5
STEP = 32 * HUGE_PAGE


@contextmanager
def huge_pages() -> Iterator[None]:
    """Collapse the anonymous memory that the process gains in this block. Does nothing where that is not possible."""
    if not sys.platform.startswith("linux"):
        yield
        return
    before = dict(anonymous_ranges())
    yield
    with suppress(OSError, AttributeError):
        deadline = time.monotonic() + BUDGET_S
        for start, stop in anonymous_ranges():
            # A range that grew at its end keeps its start: only what is new is collapsed.
            collapse(max(start, before.get(start, start)), stop, deadline)


def anonymous_ranges() -> list[tuple[int, int]]:
    """(start, stop) addresses of private writable memory that no file backs; [] where /proc is missing."""
    ranges = []
    with suppress(OSError), open("/proc/self/maps", encoding="ascii", errors="replace") as maps:
        for line in maps:
            addresses, permissions, _, _, inode, *name = line.split()
            if permissions == "rw-p" and inode == "0" and name in ([], ["[heap]"]):
                start, stop = (int(address, 16) for address in addresses.split("-"))
                ranges.append((start, stop))
    return ranges


def collapse(start: int, stop: int, deadline: float) -> int:
    """Collapse the whole huge pages within start … stop until `deadline` (time.monotonic); returns their bytes.

    Pages that were never written to stay unmapped: the kernel refuses a huge page without any content.
    """
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    collapsed = 0
    first, last = -(-start // HUGE_PAGE) * HUGE_PAGE, stop // HUGE_PAGE * HUGE_PAGE
    for address in range(first, last, STEP):
        if time.monotonic() > deadline:
            break
        length = min(STEP, last - address)
        madvise(address, length, MADV_HUGEPAGE)
        collapsed += length if madvise(address, length, MADV_COLLAPSE) == 0 else 0
    return collapsed
