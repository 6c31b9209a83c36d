"""A build that shows how far it is and can be stopped: TensorRT's IProgressMonitor, and a thread to run it on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from threading import Event
from typing import Any, Protocol, TypeVar

from starling.engine.engine import in_background
from starling.engine.tensorrt.library import Library

T = TypeVar("T")


class BuildProgress(Protocol):
    """Told what a build is doing."""

    def phase(self, text: str) -> None:
        """A new phase begins."""

    def steps(self, done: int, total: int) -> None:
        """So many steps of the phase are done."""

    def note(self, text: str) -> None:
        """Something that the person at the terminal should know."""


class Silent:
    """Tells nobody."""

    def phase(self, text: str) -> None:
        """Nothing."""

    def steps(self, done: int, total: int) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


def monitored(library: Library, config: Any, progress: BuildProgress, build: Callable[[], T]) -> T:
    """Run `build`, which builds with `config`, and pass TensorRT's phases on to `progress`.

    The build has a thread of its own, so that Ctrl-C (or SIGTERM) reaches this one at once; it is then cancelled at its
    next step, and awaited before the interrupt goes on.
    """
    cancelled = Event()
    config.progress_monitor = _monitor(library.module, progress, cancelled)
    wait = in_background(build)
    try:
        return wait()
    except BaseException:
        cancelled.set()
        with suppress(Exception):
            wait()
        raise


def _monitor(module: Any, progress: BuildProgress, cancelled: Event) -> Any:
    """An IProgressMonitor. Only the phases right below the whole build are shown; those below them are too short."""

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self.parents: dict[str, str | None] = {}
            self.totals: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.parents[phase_name], self.totals[phase_name] = parent_phase, num_steps
            if self.is_shown(phase_name):
                progress.phase(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if self.is_shown(phase_name):
                progress.steps(step + 1, self.totals[phase_name])
            return not cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            self.totals.pop(phase_name, None)

        def is_shown(self, phase_name: str) -> bool:
            parent = self.parents.get(phase_name)
            return parent is not None and self.parents.get(parent) is None

    return Monitor()
