"""What each layer of a plan takes in each run: TensorRT's IProfiler, one for all contexts of a backend.

Not run on hardware yet.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from starling.engine.backends.tensorrt.runtimes import Library
from starling.engine.errors import BackendError

_CONTEXT_NEEDS = ("profiler", "enqueue_emits_profile", "report_to_profiler")


class LayerTime(NamedTuple):
    """One layer of one run, by the name that the plan gives it, and its milliseconds."""

    layer: str
    ms: float


class TimedRun(NamedTuple):
    """One run of the model: milliseconds from its launch to its end on the device, and its layers in their order."""

    ms: float
    layers: tuple[LayerTime, ...]


class LayerTimes:
    """Collects the layers that contexts report, run by run."""

    def __init__(self, library: Library) -> None:
        """Raises BackendError where the library has no profiler."""
        self._title = library.title
        context = getattr(library.module, "IExecutionContext", None)
        missing = [f"IExecutionContext.{name}" for name in _CONTEXT_NEEDS if not hasattr(context, name)]
        missing += [] if hasattr(library.module, "IProfiler") else ["IProfiler"]
        if missing:
            raise BackendError(f"{self._title} cannot time its layers, it has no {', '.join(missing)}")
        self._reported: list[LayerTime] = []
        self._runs: list[TimedRun] = []
        self._profiler = _profiler(library.module, self._reported)

    def attach(self, context: Any) -> None:
        """Have an IExecutionContext note its layers' times in every run, for `report_to_profiler` to hand over."""
        context.enqueue_emits_profile = False  # else a run would wait for its end inside the call that launches it
        context.profiler = self._profiler

    def end_run(self, ms: float) -> None:
        """What was reported since the run before belongs to one that took `ms`. Raises BackendError for nothing."""
        if not self._reported:
            raise BackendError(f"{self._title} reported no layer of a run: its plan cannot be timed layer by layer")
        self._runs.append(TimedRun(ms, tuple(self._reported)))
        self._reported.clear()

    def take(self) -> list[TimedRun]:
        """The runs since the last call, in their order."""
        runs, self._runs = self._runs, []
        return runs


def _profiler(module: Any, reported: list[LayerTime]) -> Any:
    """An IProfiler of a library's `module` that appends to `reported`."""

    class Collector(module.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            reported.append(LayerTime(layer_name, ms))

    return Collector()
