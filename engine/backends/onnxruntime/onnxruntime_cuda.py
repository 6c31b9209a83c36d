"""ONNX Runtime on an NVIDIA GPU: what a decode step chooses is in the next one's inputs, and the step is a CUDA graph.

The host launches a step without having seen the token of the step before, and reads 8 bytes a row one step later.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from starling.engine.backends.backend import (
    MOST_VERIFIED,
    DeviceChoice,
    Tokens,
    check_room,
    check_scored,
    chunk_length,
    most_scored,
)
from starling.engine.backends.cuda.cuda_device import CudaDevice, Device, address_of
from starling.engine.backends.cuda.cuda_runtime import CudaRuntime
from starling.engine.backends.cuda.device_memory import DeviceMemory
from starling.engine.backends.cuda.host_output import DeviceOutput, HostLogits
from starling.engine.backends.cuda.launched_steps import MOST_ROWS_WARM, TOKEN_BYTES, LaunchedSteps, LaunchingBackend
from starling.engine.backends.cuda.step_tensors import ITEM_BYTES, KVCache
from starling.engine.backends.cuda.token_sampler import SamplingKernel, TokenSampler
from starling.engine.backends.onnxruntime.cuda_session import (
    KERNELS_SWITCH,
    PROVIDER,
    SESSION_SETTINGS,
    check_starts,
    load_cuda,
    open_sampling,
    open_session,
    own_operators,
)
from starling.engine.backends.onnxruntime.step_buffers import ONNX_TYPES, first_line
from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import BackendError
from starling.engine.kernels import KernelsUnavailable
from starling.engine.kernels.cuda.compiler import CompilationError
from starling.engine.kernels.cuda.driver import DriverError
from starling.engine.kernels.cuda.operators import CudaOperators, is_measured
from starling.engine.names import LOGITS_TO_KEEP, NEXT_SEQLENS, NEXT_TOKENS

#: Tokens that one run prefills at most: a prompt of 2,048 took 60 ms in one run on an H200, 89 ms in chunks of 256.
PREFILL_CHUNK = 2048
LENGTH_BYTES = 4
_POSITIONS_MULTIPLE = 64  # every row of the cache then begins at an aligned address
_UNCAPTURED = -1
_RUNS_TO_CAPTURE = 3  # ONNX Runtime runs a step twice before it captures the third


@dataclass(frozen=True, slots=True)
class _Tensors:
    """Device addresses of what a run of up to so many tokens reads and writes beside the cache."""

    ids: int
    lengths: int
    logits: int
    next_tokens: int
    next_lengths: int


@dataclass(slots=True)
class _Step:
    """A decode step of so many rows; `options` name its CUDA graph."""

    binding: Any
    options: Any
    is_captured: bool = False
    #: The CUDA graph of the same run with the kernel that draws tokens after it, where it was captured.
    drawing: int | None = None


class OrtCudaBackend(LaunchingBackend):
    """`Backend` and `StepsAhead` with ONNX Runtime on one GPU. Not thread-safe."""

    name = "onnxruntime"
    provider = PROVIDER

    def __init__(
        self,
        ort: Any,
        bundle: Bundle,
        device: Device,
        *,
        max_seq: int,
        max_batch: int,
        prefill_chunk: int | None = None,
        capture: bool = True,
        profile_prefix: Path | None = None,
        kernels: bool = False,
        settings: Mapping[str, str] | None = None,
        sampling: SamplingKernel | None = None,
    ) -> None:
        """Load the graph for CUDA and allocate everything.

        `capture` False leaves CUDA graphs out; so does `profile_prefix`, with which ONNX Runtime times every operator
        and `end_profiling` gives the file. With `kernels` the engine's own run the products of a bundle that has a
        graph for them; `kernels_note` says where they cannot. `settings` change those of SESSION_SETTINGS.
        `sampling`, which is closed with the backend, draws tokens on the device; without it the host does. Raises
        BackendError where the provider does not start or memory is short.
        """
        if bundle.cuda_graph is None:
            raise BackendError(f"{bundle.folder} has no graph for CUDA: export it again with --dtype fp16")
        self.max_seq, self.max_batch = max_seq, max_batch
        self.vocab_size = bundle.architecture.vocab_size
        self.model_seconds = 0.0
        self.note: str | None = None
        self.kernels: str | None = None
        self.kernels_note: str | None = None
        self.verified_rows = 1 if max_seq > 1 else 0
        self._ort = ort
        self._steps: dict[int, _Step] = {}
        self._row_bindings: dict[int, Any] = {}
        with ExitStack() as closing:
            self._memory = memory = DeviceMemory(device)
            closing.callback(memory.close)
            self._captures = self._captures_draws = capture and profile_prefix is None
            self.prefill_chunk = max(min(prefill_chunk or PREFILL_CHUNK, max_seq), min(MOST_VERIFIED, max_seq))
            self.most_scored = most_scored(self.vocab_size, self.prefill_chunk)
            #: What `score` writes to, allocated by its first call.
            self._scored: tuple[_Tensors, HostLogits] | None = None
            if sampling is not None:
                closing.callback(sampling.close)
            operators = self._kernels(bundle) if kernels else None
            graph = bundle.cuda_graph
            if operators is not None:
                closing.callback(operators.close)
                assert bundle.cuda_kernels is not None
                graph, self.kernels = bundle.cuda_kernels.graph, device.target
            #: The file that was loaded.
            self.graph_path = bundle.folder / graph
            self._session: Any = open_session(
                ort,
                self.graph_path,
                memory.stream,
                operators,
                captures=self._captures,
                profile_prefix=profile_prefix,
                settings={**SESSION_SETTINGS, **(settings or {})},
            )
            closing.callback(self._drop_session)
            self._allocate(bundle, sampling)
            if profile_prefix is None:
                self._warm_up()
            self._closing = closing.pop_all()

    def _kernels(self, bundle: Bundle) -> CudaOperators | None:
        """The engine's own kernels; None where the bundle has no graph for them or, with a note, they cannot be had."""
        if bundle.cuda_kernels is None:
            return None
        try:
            return own_operators(bundle.cuda_kernels, self._memory, self.prefill_chunk)
        except (KernelsUnavailable, CompilationError, DriverError, OSError) as error:
            self.kernels_note = f"without CUDA kernels: {error}"
            return None

    def _allocate(self, bundle: Bundle, sampling: SamplingKernel | None) -> None:
        memory, rows = self._memory, self.max_batch
        positions = -(-self.max_seq // _POSITIONS_MULTIPLE) * _POSITIONS_MULTIPLE
        arch = bundle.architecture
        pairs = [
            (f"past_key_values.{layer}.{side}", f"present.{layer}.{side}")
            for layer in range(arch.layers)
            for side in ("key", "value")
        ]
        self._kind = bundle.kv_cache.dtype
        self._cache = KVCache(memory, bundle, pairs, rows, positions)
        self.kv_cache_bytes = self._cache.bytes
        self._batch = self._tensors(rows, rows, feeds_itself=True)
        self._chunk = self._tensors(self.prefill_chunk, MOST_VERIFIED, feeds_itself=False)
        self._logits = HostLogits(memory, self._kind, max(rows, MOST_VERIFIED), self.vocab_size)
        self._most_kept = max(MOST_VERIFIED, self.most_scored)
        self._launched = LaunchedSteps(memory, max(rows, self._most_kept))
        self._fed_tokens, self._fed_lengths = memory.host((rows,), "int64"), memory.host((rows,), "int32")
        self._prompt = memory.host((positions,), "int64")
        self._ends = memory.host((positions,), "int32")
        self._saved = memory.allocate(rows * (TOKEN_BYTES + LENGTH_BYTES))
        kept = memory.host((self._most_kept,), "int64")
        kept[:] = np.arange(-self._most_kept, 0)
        self._kept = memory.allocate(kept.nbytes)
        memory.copy(self._kept, address_of(kept), kept.nbytes)
        # GroupQueryAttention reads these on the host: the longest row of a run, and for a decode step, whose CUDA graph
        # keeps its arguments, the longest that there can be. On an H200 that costs nothing.
        self._longest, self._any_length = np.zeros(1, np.int32), np.full(1, positions, np.int32)
        self._lengths = [0] * rows
        self._uncaptured = self._run_options(_UNCAPTURED)
        self._sampler: TokenSampler | None = None
        if sampling is not None:
            self._sampler = TokenSampler(sampling, memory, rows=rows, positions=positions, vocab_size=self.vocab_size)

    def _tensors(self, tokens: int, rows: int, *, feeds_itself: bool) -> _Tensors:
        """Room for a run of `tokens` tokens in all that gives logits for `rows` of them.

        What feeds itself writes its choice, and the lengths after it, where the next run reads them.
        """
        allocate = self._memory.allocate
        ids, lengths = allocate(tokens * TOKEN_BYTES), allocate(rows * LENGTH_BYTES)
        logits = allocate(rows * self.vocab_size * ITEM_BYTES[self._kind])
        if feeds_itself:
            return _Tensors(ids, lengths, logits, ids, lengths)
        return _Tensors(ids, lengths, logits, allocate(rows * TOKEN_BYTES), allocate(rows * LENGTH_BYTES))

    @property
    def captured_rows(self) -> list[int]:
        """The row counts whose decode step is a CUDA graph."""
        return [rows for rows, step in self._steps.items() if step.is_captured]

    def prefill(self, row: int, tokens: Tokens, start: int) -> DeviceOutput:
        """Write `tokens` int64 [n] at start..start+n of row `row`; the output is that of the last one."""
        check_room(self, row, start + len(tokens) - 1)
        begin = perf_counter()
        self.drop()  # Ctrl-C may have left work there that still reads the buffers
        self._launched.launch(lambda: self._prefill(row, tokens, start), 1, self._chunk.next_tokens)
        chosen = self._launched.oldest()
        self._lengths[row] = start + len(tokens)
        self.model_seconds += perf_counter() - begin
        return DeviceOutput(chosen, self._logits, self._chunk.logits)

    def _prefill(self, row: int, tokens: Tokens, start: int) -> None:
        copy, chunk = self._memory.copy, self._chunk
        self._prompt[: len(tokens)] = tokens
        first = 0
        while first < len(tokens):
            length = chunk_length(len(tokens) - first, self.prefill_chunk)
            copy(chunk.ids, address_of(self._prompt) + first * TOKEN_BYTES, length * TOKEN_BYTES)
            self._run_row(row, chunk, length, 1, start + first + length)
            first += length
        self._draw(row, chunk, 1)
        self._continue_with(row, chunk, 1)

    def _draw(self, row: int, tensors: _Tensors, kept: int) -> None:
        """Draw the tokens after the last `kept` of a run of the row, where it does not take the likeliest."""
        if self._sampler is not None and self._sampler.draws(row):
            self._sampler.enqueue(
                tensors.logits, tensors.next_lengths, tensors.next_tokens, rows=1, kept=kept, first=row
            )

    def _continue_with(self, row: int, tensors: _Tensors, kept: int) -> None:
        """Have the row's next step read the last of the `kept` tokens that a run of the row has chosen."""
        copy, last = self._memory.copy, tensors.next_tokens + (kept - 1) * TOKEN_BYTES
        copy(self._batch.ids + row * TOKEN_BYTES, last, TOKEN_BYTES)
        copy(self._batch.lengths + row * LENGTH_BYTES, tensors.next_lengths, LENGTH_BYTES)

    def _run_row(self, row: int, tensors: _Tensors, length: int, kept: int, end: int) -> None:
        """Run `length` tokens of one row, up to position `end`, with logits for the last `kept` of them."""
        self._ends[end - 1] = end - 1
        self._memory.copy(tensors.lengths, address_of(self._ends[end - 1 :]), LENGTH_BYTES)
        self._longest[0] = end
        binding = self._row_bindings.get(row)
        if binding is None:
            binding = self._row_bindings[row] = self._session.io_binding()
            self._bind_cache(binding, row, 1)
        self._bind(binding, tensors, (1, length), kept, self._longest)
        self._run(binding, self._uncaptured)

    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> DeviceOutput:
        """One token for each of the first k rows: `tokens`[i] is written at `positions`[i] of row i."""
        rows = len(tokens)
        check_room(self, rows - 1, max(positions))
        begin = perf_counter()
        if self._launched.busy:
            self.drop()
        self._feed(tokens, positions)
        self._launch(rows)
        chosen = self._launched.oldest()
        self.model_seconds += perf_counter() - begin
        return DeviceOutput(chosen, self._logits, self._batch.logits)

    def check_verifies(self) -> None:
        """Every graph for CUDA verifies."""

    def verify(self, row: int, tokens: Sequence[int], start: int) -> DeviceOutput:
        """Write `tokens` [n] at start..start+n of row `row`; the output has n rows."""
        length = len(tokens)
        check_room(self, row, start + length - 1)
        if not 1 <= length <= MOST_VERIFIED:
            raise BackendError(f"{length} tokens are to be verified in one step: give 1 to {MOST_VERIFIED}")
        begin = perf_counter()
        self.drop()
        self._prompt[:length] = tokens

        def run() -> None:
            self._memory.copy(self._chunk.ids, address_of(self._prompt), length * TOKEN_BYTES)
            self._run_row(row, self._chunk, length, length, start + length)
            self._draw(row, self._chunk, length)

        self._launched.launch(run, length, self._chunk.next_tokens)
        chosen = self._launched.oldest()
        self.model_seconds += perf_counter() - begin
        return DeviceOutput(chosen, self._logits, self._chunk.logits)

    def check_scores(self) -> None:
        """Every graph for CUDA scores."""

    def score(self, row: int, tokens: Tokens, start: int) -> DeviceOutput:
        """Write `tokens` int64 [n] at start..start+n of row `row`; the output has n rows."""
        count = len(tokens)
        check_scored(count, self.most_scored)
        check_room(self, row, start + count - 1)
        begin = perf_counter()
        self.drop()
        tensors, logits = self._scored = self._scored or self._score_memory()
        self._prompt[:count] = tokens

        def run() -> None:
            self._memory.copy(tensors.ids, address_of(self._prompt), count * TOKEN_BYTES)
            self._run_row(row, tensors, count, count, start + count)
            self._draw(row, tensors, count)
            self._continue_with(row, tensors, count)

        self._launched.launch(run, count, tensors.next_tokens)
        chosen = self._launched.oldest()
        self._lengths[row] = start + count
        self.model_seconds += perf_counter() - begin
        return DeviceOutput(chosen, logits, tensors.logits)

    def _score_memory(self) -> tuple[_Tensors, HostLogits]:
        most = self.most_scored
        tensors = self._tensors(most, most, feeds_itself=False)
        return tensors, HostLogits(self._memory, self._kind, most, self.vocab_size)

    def clear(self, row: int) -> None:
        """Nothing to do: the operators read no position after a row's end (on an H200 with a cache full of NaN)."""

    def can_choose(self, choice: DeviceChoice) -> bool:
        """The likeliest token; with a sampler every other choice too."""
        return choice.top_k == 1 or self._sampler is not None

    def choose(self, row: int, choice: DeviceChoice, first: int) -> None:
        """Choose the row's tokens by `choice` from now on; the step that writes position `first` has its first draw."""
        if self._sampler is not None:
            self.drop()
            self._sampler.write(row, choice, first)

    def end_profiling(self) -> Path:
        """The file in which ONNX Runtime has timed every operator, complete from now on."""
        return Path(self._session.end_profiling())

    def close(self) -> None:
        """Free the session, the cache and every buffer; a second call does nothing."""
        self._closing.close()

    def _drop_session(self) -> None:
        self._steps.clear()
        self._row_bindings.clear()
        self._session = None

    def _feed(self, tokens: Sequence[int], positions: Sequence[int]) -> None:
        """Have the next step read these tokens at these positions, in place of its own choice."""
        rows = len(tokens)
        self._fed_tokens[:rows], self._fed_lengths[:rows] = tokens, positions
        self._lengths[:rows] = positions
        self._memory.copy(self._batch.ids, address_of(self._fed_tokens), rows * TOKEN_BYTES)
        self._memory.copy(self._batch.lengths, address_of(self._fed_lengths), rows * LENGTH_BYTES)

    def _launch(self, rows: int) -> None:
        step = self._steps.get(rows) or self._new_step(rows)
        if not step.is_captured and self._captures:
            self._capture(step, rows)
        for row in range(rows):
            self._lengths[row] += 1
        if self._sampler is not None and self._sampler.draws(0, rows):
            if step.drawing is None and step.is_captured and self._captures_draws:
                self._capture_drawing(step, rows)
            self._launched.launch(lambda: self._run_drawing(step, rows), rows, self._batch.next_tokens)
            return
        options = step.options if step.is_captured else self._uncaptured
        self._launched.launch(lambda: self._run(step.binding, options), rows, self._batch.next_tokens)

    def _run_drawing(self, step: _Step, rows: int) -> None:
        if step.drawing is not None:
            self._memory.device.launch(step.drawing, self._memory.stream)
        else:
            self._run_and_draw(step, rows, step.options if step.is_captured else self._uncaptured)

    def _run_and_draw(self, step: _Step, rows: int, options: Any) -> None:
        """The step, whose choice is overwritten by what is drawn."""
        assert self._sampler is not None
        self._run(step.binding, options)
        batch = self._batch
        self._sampler.enqueue(batch.logits, batch.next_lengths, batch.next_tokens, rows=rows)

    def _capture_drawing(self, step: _Step, rows: int) -> None:
        """Make the CUDA graph of a step that draws; nothing of it runs. ONNX Runtime has run the same step before."""
        try:
            step.drawing = self._memory.capture(lambda: self._run_and_draw(step, rows, self._uncaptured))
        except (BackendError, DriverError) as error:
            self._captures_draws, self.note = (
                False,
                f"the kernel that draws tokens is no part of a step's CUDA graph: {error}",
            )

    def _new_step(self, rows: int) -> _Step:
        binding = self._session.io_binding()
        self._bind_cache(binding, 0, rows)
        self._bind(binding, self._batch, (rows, 1), 1, self._any_length)
        step = self._steps[rows] = _Step(binding, self._run_options(rows))
        return step

    def _warm_up(self) -> None:
        """Run everything once, so that the first prompt waits for no memory, no kernel and no capture."""
        self.prefill(0, np.zeros(self.prefill_chunk, np.int64), 0)
        for rows in range(1, min(self.max_batch, MOST_ROWS_WARM) + 1):
            self.decode([0] * rows, [0] * rows)
            if self._sampler is not None and self._captures_draws and self._steps[rows].is_captured:
                self._capture_drawing(self._steps[rows], rows)
        self.model_seconds = 0.0

    def _capture(self, step: _Step, rows: int) -> None:
        """Make the CUDA graph of a step: what it runs for that is taken back.

        It writes the positions that come next in each row, which the step itself writes again; where a row has no room
        for so many the capture is put off.
        """
        if max(self._lengths[:rows]) + _RUNS_TO_CAPTURE > self.max_seq:
            return
        copy, batch, tokens = self._memory.copy, self._batch, rows * TOKEN_BYTES
        copy(self._saved, batch.ids, tokens)
        copy(self._saved + tokens, batch.lengths, rows * LENGTH_BYTES)
        try:
            self._run(step.binding, step.options)
            step.is_captured = True
        except BackendError as error:
            self._captures, self.note = False, f"decode steps run without CUDA graphs: {error}"
        copy(batch.ids, self._saved, tokens)
        copy(batch.lengths, self._saved + tokens, rows * LENGTH_BYTES)

    def _run(self, binding: Any, options: Any) -> None:
        try:
            self._session.run_with_iobinding(binding, options)
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise BackendError(f"ONNX Runtime failed in a step of the model: {first_line(error)}") from error

    def _run_options(self, graph: int) -> Any:
        options = self._ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph))
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return options

    def _bind_cache(self, binding: Any, first: int, rows: int) -> None:
        """Past and present are the same memory: rows first..first+rows of the cache."""
        shape, kind = [rows, *self._cache.row_shape], ONNX_TYPES[self._kind]
        for past, present, address in self._cache.rows_from(first):
            binding.bind_input(past, "cuda", 0, kind, shape, address)
            binding.bind_output(present, "cuda", 0, kind, shape, address)

    def _bind(
        self, binding: Any, tensors: _Tensors, shape: tuple[int, int], kept: int, longest: npt.NDArray[np.int32]
    ) -> None:
        """Bind the buffers' beginnings for [rows, length] tokens with logits for the last `kept` of each row."""
        rows, where, of = shape[0], "cuda", ONNX_TYPES
        skipped = self._kept + (self._most_kept - kept) * TOKEN_BYTES
        binding.bind_input("input_ids", where, 0, of["int64"], list(shape), tensors.ids)
        binding.bind_input("seqlens_k", where, 0, of["int32"], [rows], tensors.lengths)
        binding.bind_input("total_sequence_length", "cpu", 0, of["int32"], [], longest.ctypes.data)
        binding.bind_input(LOGITS_TO_KEEP, where, 0, of["int64"], [kept], skipped)
        binding.bind_output("logits", where, 0, of[self._kind], [rows, kept, self.vocab_size], tensors.logits)
        binding.bind_output(NEXT_TOKENS, where, 0, of["int64"], [rows, kept], tensors.next_tokens)
        binding.bind_output(NEXT_SEQLENS, where, 0, of["int32"], [rows], tensors.next_lengths)


def open_cuda(
    ort: Any,
    bundle: Bundle,
    *,
    max_seq: int,
    max_batch: int,
    prefill_chunk: int | None,
    profile_prefix: Path | None = None,
) -> OrtCudaBackend:
    """The backend on the first GPU. Raises BackendError where there is none, or the provider does not start."""
    load_cuda(ort)
    device = CudaDevice(CudaRuntime())
    check_starts(ort)
    sampling, note = open_sampling(device, bundle.kv_cache.dtype)
    backend = OrtCudaBackend(
        ort,
        bundle,
        device,
        max_seq=max_seq,
        max_batch=max_batch,
        prefill_chunk=prefill_chunk,
        profile_prefix=profile_prefix,
        kernels={"0": False, "1": True}.get(os.environ.get(KERNELS_SWITCH, ""), is_measured(device.target)),
        sampling=sampling,
    )
    backend.kernels_note = backend.kernels_note or note
    return backend
