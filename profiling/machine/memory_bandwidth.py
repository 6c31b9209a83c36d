"""The bandwidth of the machine's own memory, the limit that a decode step is held against."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from starling.engine.backends.cuda.cuda_device import Device
from starling.engine.backends.cuda.device_memory import DeviceMemory
from starling.engine.errors import UserError

# numpy's int32 maximum is vectorised and releases the GIL; of its reductions it comes closest to a C read loop (the
# float32 sum and dot product stay 10-20 % below).
_WORD = np.dtype(np.int32)


def measure_read_bandwidth(threads: int, bytes: int = 256 * 2**20, repeats: int = 15) -> float:
    """Read bandwidth in bytes per second with `threads` threads, the best of `repeats` passes.

    A pass is some 10 ms, short enough for another process to spoil several in a row, hence the many passes.
    Each thread reduces its own part of one array of `bytes` bytes, which must be well beyond the last-level cache
    for the figure to mean memory. Every part is allocated and written by its thread before the clock starts.

    Raises:
        UserError: `threads` or `repeats` below 1, or `bytes` too few to give every thread one word.
    """
    if threads < 1 or repeats < 1:
        raise UserError(f"threads is {threads} and repeats is {repeats}: give both as 1 or more")
    if bytes < threads * _WORD.itemsize:
        raise UserError(f"bytes is {bytes}: give at least {threads * _WORD.itemsize} for {threads} threads")
    parts = np.array_split(np.empty(bytes // _WORD.itemsize, _WORD), threads)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(_touch, parts))
        best = min(_timed_pass(pool, parts) for _ in range(repeats))
    return sum(part.nbytes for part in parts) / best


def _touch(part: NDArray[np.int32]) -> None:
    """Write `part` from the thread that will read it, so that its pages exist, near that thread's core."""
    part.fill(1)


def _timed_pass(pool: ThreadPoolExecutor, parts: list[NDArray[np.int32]]) -> float:
    """Seconds in which all `parts` are read once, each by one thread."""
    start = time.perf_counter()
    list(pool.map(np.max, parts))
    return time.perf_counter() - start


def measure_copy_bandwidth(device: Device, bytes: int = 512 * 2**20, copies: int = 8, repeats: int = 5) -> float:
    """Bytes per second that a GPU reads and writes while it copies in its own memory, the best of `repeats` passes.

    A pass is `copies` copies of `bytes` bytes, many times what its caches hold. Raises BackendError where the GPU
    has no room for two such blocks.
    """
    memory = DeviceMemory(device)
    try:
        source, destination = memory.allocate(bytes), memory.allocate(bytes)
        memory.copy(destination, source, bytes)
        memory.synchronize()
        best = float("inf")
        for _ in range(repeats):
            begin = time.perf_counter()
            for _ in range(copies):
                memory.copy(destination, source, bytes)
            memory.synchronize()
            best = min(best, time.perf_counter() - begin)
    finally:
        memory.close()
    return 2 * bytes * copies / best
