"""Where the CUDA kernels run while they are checked and timed: a card, or the emulation on the CPU for a dry run."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any, Protocol

from starling.engine.kernels.cuda import compiler
from starling.engine.kernels.cuda.variants import Attention, Linear

Grid = tuple[int, int, int]
Defines = dict[str, int]


@dataclass(frozen=True, slots=True)
class Source:
    """One kernel to build: `file` and the function in it."""

    file: str
    function: str
    defines: tuple[tuple[str, int], ...]
    threads: int
    shared_bytes: int

    @classmethod
    def of(cls, variant: Linear | Attention) -> Source:
        name = type(variant).__name__.lower()
        return cls(f"{name}.cu", name, tuple(variant.defines().items()), variant.threads, variant.shared_bytes)


NORM = Source("norm.cu", "rms_norm", (), 512, 64)


class Built(Protocol):
    """A kernel that can be launched."""

    def registers(self) -> tuple[int, int]: ...

    def blocks_of_a_multiprocessor(self, threads: int) -> int: ...


class Target(Protocol):
    """A card or its emulation."""

    device: str
    name: str
    multiprocessors: int
    is_card: bool

    def announce(self, sources: list[Source]) -> None:
        """Begins to build what will be asked for, in this order."""

    def kernel(self, source: Source) -> Any: ...

    def launch(self, source: Source, grid: Grid, arguments: ctypes.Structure, *, early: bool) -> None: ...

    def synchronize(self) -> None: ...

    def close(self) -> None: ...

    def time_us(self, work: Callable[[], None], replays: int) -> float:
        """The median of one run of `work`, captured as a graph."""


@dataclass(slots=True)
class Card:
    """The first GPU. Built after `builders` has been started: processes are forked before CUDA is."""

    builders: ProcessPoolExecutor
    device: str = "cuda"
    is_card: bool = True
    name: str = ""
    arch: str = ""
    multiprocessors: int = 0
    _codes: dict[Source, Future[bytes]] = field(default_factory=dict)
    _kernels: dict[Source, Any] = field(default_factory=dict)
    _stream: Any = None

    def announce(self, sources: list[Source]) -> None:
        for source in sources:
            if source not in self._codes:
                task = self.builders.submit(compiler.cubin, source.file, dict(source.defines), self.arch)
                self._codes[source] = task

    def open(self) -> None:
        """Starts CUDA."""
        import torch

        properties = torch.cuda.get_device_properties(0)
        self.name, self.multiprocessors = properties.name, properties.multi_processor_count
        own = f"sm_{properties.major}{properties.minor}"
        if own != self.arch:
            raise RuntimeError(f"the kernels are built for {self.arch}, the card is {own}: give --arch {own}")
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        torch.cuda.set_stream(self._stream)

    def kernel(self, source: Source) -> Any:
        from starling.engine.kernels.cuda.driver import Kernel

        if source not in self._kernels:
            self.announce([source])
            code = self._codes[source].result(timeout=60)
            self._kernels[source] = Kernel(code, source.function, source.shared_bytes)
        return self._kernels[source]

    def launch(self, source: Source, grid: Grid, arguments: ctypes.Structure, *, early: bool) -> None:
        early = early and int(self.arch.removeprefix("sm_")) >= 90
        self.kernel(source).launch(grid, source.threads, arguments, self._stream.cuda_stream, early=early)

    def close(self) -> None:
        """Ends builds that no one waits for any more."""
        processes = list((self.builders._processes or {}).values())
        self.builders.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()

    def synchronize(self) -> None:
        import torch

        torch.cuda.synchronize()

    def time_us(self, work: Callable[[], None], replays: int) -> float:
        import torch

        work()  # cuBLAS makes its workspace outside of the capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        try:
            work()
        finally:
            graph.capture_end()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]  # type: ignore[no-untyped-call]
        graph.replay()
        for event in events[:-1]:
            event.record()
            graph.replay()
        events[-1].record()
        torch.cuda.synchronize()
        times = [first.elapsed_time(second) for first, second in pairwise(events)]
        return float(1e3 * median(times))


@dataclass(slots=True)
class EmulatedCard:
    """Fibers on the CPU: right or wrong, but no times."""

    device: str = "cpu"
    name: str = "emulation"
    multiprocessors: int = 3
    is_card: bool = False

    def announce(self, sources: list[Source]) -> None:
        pass

    def kernel(self, source: Source) -> Any:
        return _Emulated(compiler.emulated(source.file, dict(source.defines)))

    def launch(self, source: Source, grid: Grid, arguments: ctypes.Structure, *, early: bool) -> None:
        library = compiler.emulated(source.file, dict(source.defines))
        run = getattr(library, f"emulate_{source.function}")
        run(ctypes.byref(arguments), *(ctypes.c_uint(size) for size in grid))

    def synchronize(self) -> None:
        pass

    def close(self) -> None:
        pass

    def time_us(self, work: Callable[[], None], replays: int) -> float:
        start = time.perf_counter()
        work()
        return 1e6 * (time.perf_counter() - start)


@dataclass(frozen=True, slots=True)
class _Emulated:
    library: ctypes.CDLL

    def registers(self) -> tuple[int, int]:
        return 0, 0

    def blocks_of_a_multiprocessor(self, threads: int) -> int:
        return 1


def start_builders() -> ProcessPoolExecutor:
    """Call before torch is imported."""
    return ProcessPoolExecutor(max_workers=max(1, (os.cpu_count() or 2) - 2))
