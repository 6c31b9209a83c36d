"""A GPU's stand-in: host memory as device memory, and streams whose work waits until somebody waits for it."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from starling.engine.backends.cuda.cuda_device import ALIGNMENT, HostArray
from starling.engine.errors import BackendError

Work = Callable[[], None]
FILL = 0x7F  # fresh memory holds huge numbers: forgotten zeroes show


class HostDevice:
    """`Device` on the CPU. Work is put off as long as CUDA may put it off, so that a missing wait gives wrong results.

    Every address of a copy must lie in memory that is allocated; what was not freed stays in `live`.
    """

    def __init__(self, name: str = "HostDevice", target: str = "sm89", room: int = 2**31) -> None:
        self.name, self.target, self._room = name, target, room
        self.multiprocessors = 4
        self._memory: dict[int, npt.NDArray[np.uint8]] = {}
        self._queues: dict[int, deque[Work]] = {}
        self._recording: list[Work] | None = None
        self._graphs: dict[int, list[Work]] = {}
        self._happened: dict[int, bool] = {}
        self._handles = iter(range(1, 10**9))
        self.launches = self.captures = 0
        #: Bytes that were copied to page-locked host memory.
        self.bytes_to_host = 0
        self._pinned: set[int] = set()

    @property
    def live(self) -> int:
        """Allocations, streams, events and graphs that nobody has freed."""
        return len(self._memory) + len(self._queues) + len(self._graphs) + len(self._happened)

    def allocate(self, size: int) -> int:
        self._room -= size
        if self._room < 0:
            raise BackendError("no room in the GPU's memory")
        padded = np.full(size + ALIGNMENT, FILL, np.uint8)
        address = -(-padded.ctypes.data // ALIGNMENT) * ALIGNMENT
        self._memory[address] = padded[address - padded.ctypes.data :][:size]
        return address

    def free(self, address: int) -> None:
        del self._memory[address]

    def host_array(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> HostArray:
        array = np.zeros(shape, dtype)
        self._memory[array.ctypes.data] = array.reshape(-1).view(np.uint8)
        self._pinned.add(array.ctypes.data)
        return array

    def free_host(self, array: HostArray) -> None:
        self._pinned.remove(array.ctypes.data)
        del self._memory[array.ctypes.data]

    def create_stream(self) -> int:
        stream = next(self._handles)
        self._queues[stream] = deque()
        return stream

    def destroy_stream(self, stream: int) -> None:
        del self._queues[stream]

    def put(self, stream: int, work: Work) -> None:
        """What a kernel launch does."""
        if self._recording is not None:
            self._recording.append(work)
        else:
            self._queues[stream].append(work)

    def copy(self, destination: int, source: int, size: int, stream: int) -> None:
        self._allocation(source, size)
        if self._allocation(destination, size) in self._pinned:
            self.bytes_to_host += size
        self.put(stream, lambda: _move(destination, source, size))

    def zero(self, address: int, size: int, stream: int) -> None:
        self._allocation(address, size)
        self.put(stream, lambda: _clear(address, size))

    def synchronize(self, stream: int) -> None:
        assert self._recording is None, "a stream that is captured cannot be waited for"
        queue = self._queues[stream]
        while queue:
            queue.popleft()()

    def create_event(self) -> int:
        event = next(self._handles)
        self._happened[event] = True
        return event

    def destroy_event(self, event: int) -> None:
        del self._happened[event]

    def record(self, event: int, stream: int) -> None:
        self._happened[event] = False
        self.put(stream, lambda: self._happened.__setitem__(event, True))

    def wait(self, event: int) -> None:
        for queue in self._queues.values():
            while not self._happened[event] and queue:
                queue.popleft()()
        assert self._happened[event], "the event was never recorded"

    def capture(self, stream: int, work: Work) -> int:
        self._recording = recorded = []
        try:
            work()
        finally:
            self._recording = None
        graph = next(self._handles)
        self._graphs[graph] = recorded
        self.captures += 1
        return graph

    def launch(self, graph: int, stream: int) -> None:
        self.launches += 1
        for work in self._graphs[graph]:
            self.put(stream, work)

    def destroy_graph(self, graph: int) -> None:
        del self._graphs[graph]

    def _allocation(self, address: int, size: int) -> int:
        for base, part in self._memory.items():
            if base <= address and address + size <= base + len(part):
                return base
        raise AssertionError(f"{size} bytes at {address:#x} are not inside one allocation")


def _move(destination: int, source: int, size: int) -> None:
    ctypes.memmove(destination, source, size)


def _clear(address: int, size: int) -> None:
    ctypes.memset(address, 0, size)
