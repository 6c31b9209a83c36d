"""ONNX Runtime on an NVIDIA GPU: what a decode step chooses is in the next one's inputs, and the step is a CUDA graph.

The host launches a step without having seen the token of the step before, and reads 8 bytes a row one step later.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

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
from starling.engine.backends.onnxruntime.decode_graphs import DecodeGraphs
from starling.engine.backends.onnxruntime.device_runs import LENGTH_BYTES, DeviceRuns, RunTensors
from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import BackendError
from starling.engine.kernels import KernelsUnavailable
from starling.engine.kernels.cuda.compiler import CompilationError
from starling.engine.kernels.cuda.driver import DriverError
from starling.engine.kernels.cuda.operators import CudaOperators, is_measured

#: Tokens that one run prefills at most: a prompt of 2,048 took 60 ms in one run on an H200, 89 ms in chunks of 256.
PREFILL_CHUNK = 2048
_POSITIONS_MULTIPLE = 64  # every row of the cache then begins at an aligned address


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
        with ExitStack() as closing:
            self._memory = memory = DeviceMemory(device)
            closing.callback(memory.close)
            captures = capture and profile_prefix is None
            self.prefill_chunk = max(min(prefill_chunk or PREFILL_CHUNK, max_seq), min(MOST_VERIFIED, max_seq))
            self.most_scored = most_scored(self.vocab_size, self.prefill_chunk)
            #: What `score` writes to, allocated by its first call.
            self._scored: tuple[RunTensors, HostLogits] | None = None
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
            self._runs = DeviceRuns(
                ort,
                open_session(
                    ort,
                    self.graph_path,
                    memory.stream,
                    operators,
                    captures=captures,
                    profile_prefix=profile_prefix,
                    settings={**SESSION_SETTINGS, **(settings or {})},
                ),
                memory,
                bundle,
            )
            closing.callback(self._runs.close)
            self._allocate(bundle, sampling, captures=captures)
            closing.callback(self._graphs.clear)
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

    def _allocate(self, bundle: Bundle, sampling: SamplingKernel | None, *, captures: bool) -> None:
        memory, rows, max_seq = self._memory, self.max_batch, self.max_seq
        positions = -(-max_seq // _POSITIONS_MULTIPLE) * _POSITIONS_MULTIPLE
        self._kind = bundle.kv_cache.dtype
        most_kept = max(MOST_VERIFIED, self.most_scored)
        self._runs.allocate(rows, positions, most_kept)
        self._cache = self._runs.cache
        self.kv_cache_bytes = self._cache.bytes
        self._batch = self._runs.tensors(rows, rows, feeds_itself=True)
        self._chunk = self._runs.tensors(self.prefill_chunk, MOST_VERIFIED, feeds_itself=False)
        self._logits = HostLogits(memory, self._kind, max(rows, MOST_VERIFIED), self.vocab_size)
        self._launched = LaunchedSteps(memory, max(rows, most_kept))
        self._fed_tokens, self._fed_lengths = memory.host((rows,), "int64"), memory.host((rows,), "int32")
        self._prompt = memory.host((positions,), "int64")
        self._lengths = [0] * rows
        self._sampler: TokenSampler | None = None
        if sampling is not None:
            self._sampler = TokenSampler(sampling, memory, rows=rows, positions=positions, vocab_size=self.vocab_size)
        self._graphs = DecodeGraphs(
            self._runs,
            memory,
            self._batch,
            self._sampler,
            rows=rows,
            max_seq=max_seq,
            captures=captures,
            note=self._take_note,
        )

    def _take_note(self, note: str) -> None:
        self.note = note

    @property
    def captured_rows(self) -> list[int]:
        """The row counts whose decode step is a CUDA graph."""
        return self._graphs.captured_rows

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
            self._runs.run_row(row, chunk, length, 1, start + first + length)
            first += length
        self._draw(row, chunk, 1)
        self._continue_with(row, chunk, 1)

    def _draw(self, row: int, tensors: RunTensors, kept: int) -> None:
        """Draw the tokens after the last `kept` of a run of the row, where it does not take the likeliest."""
        if self._sampler is not None and self._sampler.draws(row):
            self._sampler.enqueue(
                tensors.logits, tensors.next_lengths, tensors.next_tokens, rows=1, kept=kept, first=row
            )

    def _continue_with(self, row: int, tensors: RunTensors, kept: int) -> None:
        """Have the row's next step read the last of the `kept` tokens that a run of the row has chosen."""
        copy, last = self._memory.copy, tensors.next_tokens + (kept - 1) * TOKEN_BYTES
        copy(self._batch.ids + row * TOKEN_BYTES, last, TOKEN_BYTES)
        copy(self._batch.lengths + row * LENGTH_BYTES, tensors.next_lengths, LENGTH_BYTES)

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
            self._runs.run_row(row, self._chunk, length, length, start + length)
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
            self._runs.run_row(row, tensors, count, count, start + count)
            self._draw(row, tensors, count)
            self._continue_with(row, tensors, count)

        self._launched.launch(run, count, tensors.next_tokens)
        chosen = self._launched.oldest()
        self._lengths[row] = start + count
        self.model_seconds += perf_counter() - begin
        return DeviceOutput(chosen, logits, tensors.logits)

    def _score_memory(self) -> tuple[RunTensors, HostLogits]:
        most = self.most_scored
        tensors = self._runs.tensors(most, most, feeds_itself=False)
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
        return Path(self._runs.session.end_profiling())

    def close(self) -> None:
        """Free the session, the cache and every buffer; a second call does nothing."""
        self._closing.close()

    def _feed(self, tokens: Sequence[int], positions: Sequence[int]) -> None:
        """Have the next step read these tokens at these positions, in place of its own choice."""
        rows = len(tokens)
        self._fed_tokens[:rows], self._fed_lengths[:rows] = tokens, positions
        self._lengths[:rows] = positions
        self._memory.copy(self._batch.ids, address_of(self._fed_tokens), rows * TOKEN_BYTES)
        self._memory.copy(self._batch.lengths, address_of(self._fed_lengths), rows * LENGTH_BYTES)

    def _launch(self, rows: int) -> None:
        step = self._graphs.prepared(rows, max(self._lengths[:rows]))
        for row in range(rows):
            self._lengths[row] += 1
        self._launched.launch(step, rows, self._batch.next_tokens)

    def _warm_up(self) -> None:
        """Run everything once, so that the first prompt waits for no memory, no kernel and no capture."""
        self.prefill(0, np.zeros(self.prefill_chunk, np.int64), 0)
        for rows in range(1, min(self.max_batch, MOST_ROWS_WARM) + 1):
            self.decode([0] * rows, [0] * rows)
            self._graphs.capture_drawing(rows)
        self.model_seconds = 0.0


def open_cuda(
    ort: Any,
    bundle: Bundle,
    *,
    max_seq: int,
    max_batch: int,
    prefill_chunk: int | None,
    capture: bool = True,
    profile_prefix: Path | None = None,
    kernels: bool | None = None,
    settings: Mapping[str, str] | None = None,
) -> OrtCudaBackend:
    """The backend on the first GPU. Raises BackendError where there is none, or the provider does not start.

    `kernels` None: the engine's own as KERNELS_SWITCH says, by default on cards that have shown them to be faster.
    """
    load_cuda(ort)
    device = CudaDevice(CudaRuntime())
    check_starts(ort)
    if kernels is None:
        kernels = {"0": False, "1": True}.get(os.environ.get(KERNELS_SWITCH, ""), is_measured(device.target))
    sampling, note = open_sampling(device, bundle.kv_cache.dtype)
    backend = OrtCudaBackend(
        ort,
        bundle,
        device,
        max_seq=max_seq,
        max_batch=max_batch,
        prefill_chunk=prefill_chunk,
        capture=capture,
        profile_prefix=profile_prefix,
        kernels=kernels,
        settings=settings,
        sampling=sampling,
    )
    backend.kernels_note = backend.kernels_note or note
    return backend
