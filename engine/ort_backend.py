"""ONNX Runtime backend: a session whose KV cache is allocated once, and bound as past and as present.

The CUDA path has not been run on a GPU yet; the CPU path is tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

from starling.engine.backend import StepOutput, Tokens, check_room, chunk_length
from starling.engine.bundle import Bundle
from starling.engine.errors import BackendError
from starling.engine.huge_pages import huge_pages
from starling.engine.ort_buffers import (
    OrtOutput,
    StepOutputs,
    allocate_cache,
    first_line,
)
from starling.engine.ort_inputs import INPUTS, StepWriter

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# What ONNX Runtime 1.32 has kernels for: MatMul on the CPU lacks bf16, GroupQueryAttention on CUDA lacks fp32.
RUNNABLE = {CPU: ("fp32", "fp16"), CUDA: ("fp16", "bf16")}


def import_onnxruntime() -> Any:
    """The onnxruntime module. Raises BackendError when neither onnxruntime nor onnxruntime-gpu is installed."""
    try:
        return import_module("onnxruntime")
    except ImportError as error:
        raise BackendError(
            f"onnxruntime is not installed ({error}); install starling-llm[cpu], or starling-llm[gpu] for CUDA"
        ) from error


def choose_provider(bundle: Bundle, backend: str) -> str:
    """The execution provider for `backend` ("auto", "onnxruntime", "onnxruntime-cpu", "onnxruntime-cuda")."""
    available = import_onnxruntime().get_available_providers()
    if backend == "onnxruntime-cuda":
        if CUDA not in available:
            raise BackendError(
                "backend onnxruntime-cuda: this onnxruntime is built without CUDA; "
                "uninstall onnxruntime and install starling-llm[gpu], or use --backend onnxruntime-cpu"
            )
        _check_runnable(bundle, CUDA)
        return CUDA
    if backend != "onnxruntime-cpu" and CUDA in available and _why_not(bundle, CUDA) is None:
        return CUDA
    _check_runnable(bundle, CPU)
    return CPU


def _why_not(bundle: Bundle, provider: str) -> str | None:
    if provider == CUDA and bundle.dialect != "ort":
        return f"ONNX Runtime runs the {bundle.dialect} dialect as the CPU's reference only: export with --dialect ort"
    if bundle.dtype in RUNNABLE[provider]:
        return None
    if provider == CUDA:
        return f"{bundle.dtype} attention has no CUDA kernel: export with --dtype fp16, or use the CPU"
    return f"{bundle.dtype} has no CPU kernels: export with --dtype fp32, or use CUDA (starling-llm[gpu])"


def _check_runnable(bundle: Bundle, provider: str) -> None:
    reason = _why_not(bundle, provider)
    if reason is not None:
        raise BackendError(f"{bundle.folder}: ONNX Runtime's {provider} cannot run this bundle: {reason}")


@dataclass(slots=True, eq=False)
class _Step:
    """All that a decode step of so many rows needs, made once."""

    binding: Any
    write: StepWriter
    output: OrtOutput


class OrtBackend:
    """Implements `starling.engine.backend.Backend` with ONNX Runtime on one device. Not thread-safe."""

    name = "onnxruntime"
    pipeline = None
    note: str | None = None

    def __init__(
        self,
        bundle: Bundle,
        *,
        provider: str,
        max_seq: int,
        max_batch: int,
        threads: int,
        prefill_chunk: int,
        profile_prefix: Path | None = None,
    ) -> None:
        """With `profile_prefix` ONNX Runtime times every operator; `end_profiling` then gives the file."""
        self._ort = import_onnxruntime()
        self._session: Any = _open_session(self._ort, bundle, provider, threads, profile_prefix)
        self.provider: str = self._session.get_providers()[0]
        self._device = "cuda" if self.provider == CUDA else "cpu"
        self.threads, self.max_seq, self.max_batch = threads, max_seq, max_batch
        self.vocab_size = bundle.architecture.vocab_size
        self.kv_cache_bytes = bundle.kv_cache.bytes_per_token * max_seq * max_batch
        self.model_seconds = 0.0
        self._chunk = min(prefill_chunk, max_seq)
        self._cache = allocate_cache(self._ort, bundle, self._device, max_batch, max_seq)
        self._inputs = INPUTS[bundle.dialect](self._ort, self._device, max_batch, self._chunk, max_seq)
        self._outputs = StepOutputs(bundle, max_batch)
        self._row_bindings: dict[int, Any] = {}
        self._steps: dict[int, _Step] = {}
        self._row_output = self._outputs.output(1)

    def prefill(self, slot: int, tokens: Tokens, start: int) -> StepOutput:
        """Write `tokens` int64 [n] at start..start+n of row `slot`.

        GroupQueryAttention takes a chunk behind a non-empty cache only with batch 1, hence the view of one row.
        """
        first = 0
        while first < len(tokens):
            chunk = tokens[first : first + chunk_length(len(tokens) - first, self._chunk)]
            check_room(self, slot, start + first + len(chunk) - 1)
            self._inputs.write_chunk(chunk, start + first)
            self._run(self._row_binding(slot, len(chunk)))
            first += len(chunk)
        return self._row_output

    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> StepOutput:
        """One token for each of the first k rows."""
        rows, longest = len(tokens), max(positions)
        if longest >= self.max_seq or rows > self.max_batch:
            check_room(self, rows - 1, longest)
        step = self._steps.get(rows) or self._new_step(rows)
        step.write(tokens, positions, longest)
        self._run(step.binding)
        return step.output

    def clear(self, row: int) -> None:
        """Nothing to do: the operators read no position behind a row's end (tested on the CPU)."""

    def end_profiling(self) -> Path:
        """The file in which ONNX Runtime has timed every operator, complete from now on."""
        return Path(self._session.end_profiling())

    def close(self) -> None:
        """Free the session, the cache and every binding."""
        self._row_bindings.clear()
        self._steps.clear()
        self._cache.clear()
        self._session = None

    def _run(self, binding: Any) -> None:
        if self._device == "cuda":
            binding.synchronize_inputs()
        begin = perf_counter()
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise BackendError(f"ONNX Runtime failed in a step of the model: {first_line(error)}") from error
        finally:
            self.model_seconds += perf_counter() - begin

    def _new_step(self, rows: int) -> _Step:
        binding = self._bind(0, rows)
        self._inputs.bind(binding, rows, 1)
        step = self._steps[rows] = _Step(binding, self._inputs.step_writer(rows), self._outputs.output(rows))
        return step

    def _row_binding(self, slot: int, length: int) -> Any:
        binding = self._row_bindings.get(slot)
        if binding is None:
            binding = self._row_bindings[slot] = self._bind(slot, 1)
        self._inputs.bind(binding, 1, length)
        return binding

    def _bind(self, first: int, rows: int) -> Any:
        """A binding whose past and present are the same memory: rows first..first+rows of the cache."""
        binding = self._session.io_binding()
        for name, buffer in self._cache.items():
            _, heads, positions, head_dim = buffer.shape()
            kind, shape = buffer.element_type(), [rows, heads, positions, head_dim]
            pointer = buffer.data_ptr() + buffer.tensor_size_in_bytes() // self.max_batch * first
            binding.bind_input(f"past_key_values.{name}", self._device, 0, kind, shape, pointer)
            binding.bind_output(f"present.{name}", self._device, 0, kind, shape, pointer)
        self._outputs.bind(binding, rows)
        return binding


def _open_session(ort: Any, bundle: Bundle, provider: str, threads: int, profile_prefix: Path | None) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    if profile_prefix is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile_prefix)
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    if bundle.dialect == "tensorrt":  # else it multiplies quantized weights with activations that it rounds as it likes
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if provider == CUDA:
        ort.preload_dlls()
    try:
        with huge_pages() if provider == CPU else nullcontext():
            session = ort.InferenceSession(str(bundle.reference_path), options, providers=[provider])
    except Exception as error:
        raise BackendError(f"ONNX Runtime cannot load {bundle.reference_path}: {first_line(error)}") from error
    if session.get_providers()[0] != provider:
        raise BackendError(
            f"{provider} did not start on this machine; see `starling doctor`, or use --backend onnxruntime-cpu"
        )
    return session
