"""TensorRT backend: a plan's two profiles over one KV cache in the GPU's memory, tokens chosen and fed on the device.

Not run on hardware yet; the tests run its logic with the bundle's own graph on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from time import perf_counter
from typing import NoReturn

import numpy as np

from starling.engine.backends.backend import DeviceChoice, Tokens, check_room
from starling.engine.backends.cuda.cuda_device import Device, address_of
from starling.engine.backends.cuda.device_memory import DeviceMemory
from starling.engine.backends.cuda.host_output import DeviceOutput, HostLogits
from starling.engine.backends.cuda.launched_steps import MOST_ROWS_WARM, TOKEN_BYTES, LaunchedSteps, LaunchingBackend
from starling.engine.backends.cuda.row_choices import RowChoices
from starling.engine.backends.cuda.step_tensors import KVCache, StepTensors
from starling.engine.backends.tensorrt.plan_record import EngineRecord
from starling.engine.backends.tensorrt.run.execution import PlanExecution
from starling.engine.backends.tensorrt.run.layer_times import LayerTimes, TimedRun
from starling.engine.backends.tensorrt.run.steps import DecodeStep, PrefillStep
from starling.engine.backends.tensorrt.runtimes import Library
from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import BackendError
from starling.engine.names import INPUT_IDS, LOGITS, NEXT_TOKENS, PAST_LENGTHS, TEMPERATURE, TOP_K_LIMIT


class TensorRTBackend(LaunchingBackend):
    """`Backend` and `StepsAhead` with a TensorRT plan on one GPU. Not thread-safe."""

    def __init__(
        self,
        bundle: Bundle,
        record: EngineRecord,
        library: Library,
        device: Device,
        *,
        max_seq: int,
        max_batch: int,
        prefill_chunk: int | None = None,
        time_layers: bool = False,
    ) -> None:
        """Load the plan and allocate everything; `max_seq` and `max_batch` must fit the plan.

        With `time_layers` every run is waited for, outside of CUDA graphs, and `take_layer_times` says what each layer
        took. Raises BackendError where the plan does not run here or the GPU has no room.
        """
        self.name: str = library.name
        #: Not in a plan that was built without: the host draws then.
        self._draws = TEMPERATURE in {tensor.name for tensor in record.inputs}
        self.provider = f"{library.title} on {device.name}"
        self.max_seq, self.max_batch = max_seq, max_batch
        self.vocab_size = bundle.architecture.vocab_size
        self.model_seconds = 0.0
        self.note: str | None = None
        self.kernels: str | None = None
        self.verified_rows = self.most_scored = 0
        self.kernels_note: str | None = None
        with ExitStack() as closing:
            self._memory = memory = DeviceMemory(device)
            closing.callback(memory.close)
            self._times = LayerTimes(library) if time_layers else None
            self._plan = PlanExecution(library, record, memory, self._times)
            closing.callback(self._plan.close)
            #: Tokens that one run prefills at most.
            self.prefill_chunk = min(prefill_chunk or record.max_prefill, record.max_prefill, max_seq)
            self._allocate(bundle, record, self.prefill_chunk)
            closing.callback(self.drop)
            # What is likely is compiled and captured before the first prompt comes; each row count takes a context.
            self._steps: dict[int, DecodeStep] = {}
            for rows in range(1, min(max_batch, MOST_ROWS_WARM) + 1):
                self._new_step(rows)
            self.prefill(0, np.zeros(self.prefill_chunk, np.int64), 0)
            self._plan.keep_compiled()
            self.model_seconds = 0.0
            self.take_layer_times()
            self._closing = closing.pop_all()

    def _allocate(self, bundle: Bundle, record: EngineRecord, chunk: int) -> None:
        memory, rows, positions = self._memory, self.max_batch, record.max_seq
        kind = next(output.dtype for output in record.outputs if output.name == LOGITS)
        self._cache = KVCache(memory, bundle, record.aliases, rows, positions)
        self.kv_cache_bytes = self._cache.bytes
        names = {tensor.name for tensor in (*record.inputs, *record.outputs)}
        self._batch = StepTensors(memory, bundle, kind, names=names, rows=rows, length=1, positions=positions)
        self._chunk = StepTensors(memory, bundle, kind, names=names, rows=1, length=chunk, positions=positions)
        self._choices = RowChoices(memory, self._batch, rows, positions) if self._draws else None
        self._logits = HostLogits(memory, kind, rows, self.vocab_size)
        self._launched = LaunchedSteps(memory, rows)
        self._fed = memory.host((2, rows), "int64")
        self._lengths = [0] * rows
        context = self._plan.context("prefill", fixed_shape=False)
        self._prefill = PrefillStep(
            context, memory, self._cache, self._chunk, self._batch, positions=positions, chunk_length=chunk
        )

    def prefill(self, row: int, tokens: Tokens, start: int) -> DeviceOutput:
        """Write `tokens` int64 [n] at start..start+n of row `row`; the output is that of the last one."""
        check_room(self, row, start + len(tokens) - 1)
        begin = perf_counter()
        self.drop()  # Ctrl-C may have left work behind that still reads the buffers
        self._launched.launch(lambda: self._prefill.enqueue(row, tokens, start), 1, self._chunk.addresses[NEXT_TOKENS])
        self._lengths[row] = start + len(tokens)
        chosen = self._launched.oldest()
        self.model_seconds += perf_counter() - begin
        return DeviceOutput(chosen, self._logits, self._chunk.addresses[LOGITS])

    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> DeviceOutput:
        """One token for each of the first k rows: `tokens`[i] is written at `positions`[i] of row i."""
        rows = len(tokens)
        check_room(self, rows - 1, max(positions))
        begin = perf_counter()
        self._feed(tokens, positions)
        self._launch(rows)
        chosen = self._launched.oldest()
        self.model_seconds += perf_counter() - begin
        return DeviceOutput(chosen, self._logits, self._batch.addresses[LOGITS])

    def check_verifies(self) -> NoReturn:
        """Raise BackendError: the engines give logits after a step's last token only."""
        raise BackendError(
            "TensorRT engines give the last token's logits only, so no draft can be verified: "
            "speculate with a bundle of --dialect ort and --backend onnxruntime"
        )

    def verify(self, row: int, tokens: Sequence[int], start: int) -> NoReturn:
        """Raise BackendError, as `check_verifies` does."""
        self.check_verifies()

    def check_scores(self) -> NoReturn:
        """Raise BackendError: the engines give logits after a step's last token only."""
        raise BackendError(
            "TensorRT engines give the last token's logits only, so no prompt can be scored: "
            "score with a bundle of --dialect ort and --backend onnxruntime"
        )

    def score(self, row: int, tokens: Tokens, start: int) -> NoReturn:
        """Raise BackendError, as `check_scores` does."""
        self.check_scores()

    def clear(self, row: int) -> None:
        """Zero the row: masked positions enter a product with 0, which leaves NaN what it is."""
        self.drop()
        for address, size in self._cache.parts(row):
            self._memory.device.zero(address, size, self._memory.stream)

    def can_choose(self, choice: DeviceChoice) -> bool:
        """The likeliest token, and what the graph draws: from up to TOP_K_LIMIT tokens."""
        return choice.top_k == 1 or (self._draws and 1 < choice.top_k <= TOP_K_LIMIT and choice.min_p == 0)

    def choose(self, row: int, choice: DeviceChoice, first_position: int) -> None:
        """Choose the row's tokens by `choice` from now on; the step that writes `first_position` has its first draw."""
        if self._choices is None:
            return
        self.drop()
        self._choices.write(row, choice, first_position)

    def take_layer_times(self) -> list[TimedRun]:
        """The runs of the model since the last call, the first since opening; none without `time_layers`."""
        return [] if self._times is None else self._times.take()

    def close(self) -> None:
        """Free the plan, the cache and every buffer; a second call does nothing."""
        self._closing.close()

    def _launch(self, rows: int) -> None:
        step = self._steps.get(rows) or self._new_step(rows)
        for row in range(rows):
            self._lengths[row] += 1
        self._launched.launch(step.launch, rows, self._batch.addresses[NEXT_TOKENS])

    def _feed(self, tokens: Sequence[int], positions: Sequence[int]) -> None:
        """Have the next step read these tokens at these positions, in place of its own choice."""
        rows = len(tokens)
        self._fed[0, :rows], self._fed[1, :rows] = tokens, positions
        self._lengths[:rows] = positions
        for name, host in ((INPUT_IDS, self._fed[0]), (PAST_LENGTHS, self._fed[1])):
            self._memory.copy(self._batch.addresses[name], address_of(host), rows * TOKEN_BYTES)

    def _new_step(self, rows: int) -> DecodeStep:
        """In a context of its own. It runs once, and writes what the next step of these rows writes again."""
        context = self._plan.context("decode", fixed_shape=True)
        step = self._steps[rows] = DecodeStep(context, self._memory, self._cache, self._batch, rows)
        return step
