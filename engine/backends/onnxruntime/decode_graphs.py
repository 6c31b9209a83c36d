"""Decode steps as CUDA graphs: one for each number of rows, captured when such a step first runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starling.engine.backends.cuda.device_memory import DeviceMemory
from starling.engine.backends.cuda.launched_steps import TOKEN_BYTES
from starling.engine.backends.cuda.token_sampler import TokenSampler
from starling.engine.backends.onnxruntime.device_runs import LENGTH_BYTES, DeviceRuns, RunTensors
from starling.engine.errors import BackendError
from starling.engine.kernels.cuda.driver import DriverError

_RUNS_TO_CAPTURE = 3  # ONNX Runtime runs a step twice before it captures the third


@dataclass(slots=True)
class _Step:
    """A decode step of so many rows; `options` name its CUDA graph."""

    binding: Any
    options: Any
    is_captured: bool = False
    #: The CUDA graph of the same run with the kernel that draws tokens after it, where it was captured.
    drawing: int | None = None


class DecodeGraphs:
    """The steps that feed themselves by `batch`. What cannot be captured runs without a CUDA graph, with a note."""

    def __init__(
        self,
        runs: DeviceRuns,
        memory: DeviceMemory,
        batch: RunTensors,
        sampler: TokenSampler | None,
        *,
        rows: int,
        max_seq: int,
        captures: bool,
        note: Callable[[str], None],
    ) -> None:
        """`captures` False: no CUDA graphs. `note` is told why there are none, where there could be."""
        self._runs, self._memory, self._batch, self._sampler = runs, memory, batch, sampler
        self._max_seq, self._note = max_seq, note
        self._captures = self._captures_draws = captures
        self._saved = memory.allocate(rows * (TOKEN_BYTES + LENGTH_BYTES))
        self._steps: dict[int, _Step] = {}

    @property
    def captured_rows(self) -> list[int]:
        """The row counts whose decode step is a CUDA graph."""
        return [rows for rows, step in self._steps.items() if step.is_captured]

    def prepared(self, rows: int, longest: int) -> Callable[[], None]:
        """What puts a step of the first `rows` rows on the stream, whose longest has `longest` positions."""
        step = self._steps.get(rows) or self._new_step(rows)
        if not step.is_captured and self._captures:
            self._capture(step, rows, longest)
        if self._sampler is not None and self._sampler.draws(0, rows):
            self.capture_drawing(rows)
            return lambda: self._run_drawing(step, rows)
        return lambda: self._runs.run(step.binding, self._options(step))

    def capture_drawing(self, rows: int) -> None:
        """Make the CUDA graph of a step that draws; nothing of it runs. ONNX Runtime has run the same step before."""
        step = self._steps[rows]
        if self._sampler is None or step.drawing is not None or not (step.is_captured and self._captures_draws):
            return
        try:
            step.drawing = self._memory.capture(lambda: self._run_and_draw(step, rows, self._runs.uncaptured))
        except (BackendError, DriverError) as error:
            self._captures_draws = False
            self._note(f"the kernel that draws tokens is no part of a step's CUDA graph: {error}")

    def clear(self) -> None:
        """Forget the steps, which hold on to their session."""
        self._steps.clear()

    def _new_step(self, rows: int) -> _Step:
        binding = self._runs.step_binding(self._batch, rows)
        step = self._steps[rows] = _Step(binding, self._runs.options(rows))
        return step

    def _options(self, step: _Step) -> Any:
        return step.options if step.is_captured else self._runs.uncaptured

    def _run_drawing(self, step: _Step, rows: int) -> None:
        if step.drawing is not None:
            self._memory.device.launch(step.drawing, self._memory.stream)
        else:
            self._run_and_draw(step, rows, self._options(step))

    def _run_and_draw(self, step: _Step, rows: int, options: Any) -> None:
        """The step, whose choice is overwritten by what is drawn."""
        assert self._sampler is not None
        self._runs.run(step.binding, options)
        batch = self._batch
        self._sampler.enqueue(batch.logits, batch.next_lengths, batch.next_tokens, rows=rows)

    def _capture(self, step: _Step, rows: int, longest: int) -> None:
        """Make the CUDA graph of a step: what it runs for that is taken back.

        It writes the positions that come next in each row, which the step itself writes again; where a row has no room
        for so many the capture is put off.
        """
        if longest + _RUNS_TO_CAPTURE > self._max_seq:
            return
        copy, batch, tokens = self._memory.copy, self._batch, rows * TOKEN_BYTES
        copy(self._saved, batch.ids, tokens)
        copy(self._saved + tokens, batch.lengths, rows * LENGTH_BYTES)
        try:
            self._runs.run(step.binding, step.options)
            step.is_captured = True
        except BackendError as error:
            self._captures = False
            self._note(f"decode steps run without CUDA graphs: {error}")
        copy(batch.ids, self._saved, tokens)
        copy(batch.lengths, self._saved + tokens, rows * LENGTH_BYTES)
