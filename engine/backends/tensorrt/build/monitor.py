"""A build that shows how far it is and can be stopped: TensorRT's IProgressMonitor, and a thread to run it on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any, TypeVar

from starling.engine.backends.tensorrt.runtimes import Library
from starling.engine.progress import Progress

T = TypeVar("T")
_SHOWN_DEPTH = 2


def monitored(library: Library, config: Any, progress: Progress, build: Callable[[], T]) -> T:
    """Run `build`, which builds with `config`, and pass TensorRT's phases on to `progress`.

    The build has a thread of its own, so that Ctrl-C (or SIGTERM) reaches this one at once; it is then cancelled at its
    next step, and awaited before the interrupt goes on.
    """
    cancelled = Event()
    config.progress_monitor = _monitor(library.module, progress, cancelled)
    with ThreadPoolExecutor(max_workers=1) as thread:
        building = thread.submit(build)
        try:
            return building.result()
        except BaseException:
            cancelled.set()
            raise  # after the end of the block, which waits for the thread


def _monitor(module: Any, progress: Progress, cancelled: Event) -> Any:
    """An IProgressMonitor. The two levels of phases below the whole build are shown; further ones are short."""

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self.depths: dict[str, int] = {}
            self.totals: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.depths[phase_name] = 0 if parent_phase is None else self.depths.get(parent_phase, 0) + 1
            self.totals[phase_name] = num_steps
            if self.is_shown(phase_name):
                progress.phase(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if self.is_shown(phase_name):
                progress.steps(step + 1, self.totals[phase_name])
            return not cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            self.totals.pop(phase_name, None)

        def is_shown(self, phase_name: str) -> bool:
            return 1 <= self.depths.get(phase_name, 0) <= _SHOWN_DEPTH and phase_name in self.totals

    return Monitor()
