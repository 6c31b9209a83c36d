"""ONNX Runtime backend: a session whose KV cache is allocated once, and bound as past and as present.

The CUDA path has not been run on a GPU yet; the CPU path is tested.
"""

from __future__ import annotations

from importlib import import_module
from time import perf_counter
from typing import Any

import numpy as np

from starling.engine.backend import Logits, Tokens
from starling.engine.bundle import Bundle
from starling.engine.errors import BackendError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# TensorProto.DataType values, which IOBinding takes: NumPy has no bfloat16, so 16-bit floats travel as uint16.
ONNX_TYPES = {"float32": 1, "int32": 6, "int64": 7, "float16": 10, "bfloat16": 16}
HOST_TYPES = {"float32": np.float32, "float16": np.uint16, "bfloat16": np.uint16}
# NumPy converts float16 one value at a time: 115 µs for 49,152 logits, against 50 µs for looking up their bits.
FLOAT16_VALUES = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
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
    if provider == CUDA and bundle.dialect == "canonical":
        return "the canonical dialect is the CPU's reference: export with --dialect ort"
    if bundle.dtype in RUNNABLE[provider]:
        return None
    if provider == CUDA:
        return f"{bundle.dtype} attention has no CUDA kernel: export with --dtype fp16, or use the CPU"
    return f"{bundle.dtype} has no CPU kernels: export with --dtype fp32, or use CUDA (starling-llm[gpu])"


def _check_runnable(bundle: Bundle, provider: str) -> None:
    reason = _why_not(bundle, provider)
    if reason is not None:
        raise BackendError(f"{bundle.folder}: ONNX Runtime's {provider} cannot run this bundle: {reason}")


class OrtBackend:
    """Implements `starling.engine.backend.Backend` with ONNX Runtime on one device. Not thread-safe."""

    name = "onnxruntime"

    def __init__(
        self, bundle: Bundle, *, provider: str, max_seq: int, max_batch: int, threads: int, prefill_chunk: int
    ) -> None:
        self._ort = import_onnxruntime()
        self._session: Any = _open_session(self._ort, bundle, provider, threads)
        self.provider: str = self._session.get_providers()[0]
        self._device = "cuda" if self.provider == CUDA else "cpu"
        self.threads, self.max_seq, self.max_batch = threads, max_seq, max_batch
        self.vocab_size = bundle.architecture.vocab_size
        self.kv_cache_bytes = bundle.kv_cache.bytes_per_token * max_seq * max_batch
        self.model_seconds = 0.0
        self._chunk = min(prefill_chunk, max_seq)
        self._cache = _allocate_cache(self._ort, bundle, self._device, max_batch, max_seq)
        self._inputs = _StepInputs(self._ort, bundle.dialect, self._device, max_batch, self._chunk)
        self._logits = _LogitsBuffer(bundle, max_batch)
        self._row_bindings: dict[int, Any] = {}
        self._decode_bindings: dict[int, Any] = {}

    def prefill(self, slot: int, tokens: Tokens, start: int) -> Logits:
        """Write `tokens` int64 [n] at start..start+n of row `slot`; float32 logits [vocab] of the last one.

        GroupQueryAttention takes a chunk behind a non-empty cache only with batch 1, hence the view of one row.
        """
        for first in range(0, len(tokens), self._chunk):
            chunk = tokens[first : first + self._chunk]
            self._write(chunk, np.array([start + first]), len(chunk), row=slot)
            self._run(self._row_binding(slot, len(chunk)))
        logits: Logits = self._logits.read(1)[0]
        return logits

    def decode(self, tokens: Tokens, positions: Tokens) -> Logits:
        """One token for each of the first k rows, `tokens` and `positions` int64 [k]; float32 logits [k, vocab]."""
        rows = len(tokens)
        self._write(tokens, positions, 1, row=rows - 1)
        binding = self._decode_bindings.get(rows)
        if binding is None:
            binding = self._decode_bindings[rows] = self._bind(0, rows)
            self._inputs.bind(binding, rows, 1)
        self._run(binding)
        return self._logits.read(rows)

    def close(self) -> None:
        """Free the session, the cache and every binding."""
        self._row_bindings.clear()
        self._decode_bindings.clear()
        self._cache.clear()
        self._session = None

    def _write(self, tokens: Tokens, starts: Tokens, length: int, row: int) -> None:
        """Put one step's inputs into their buffers; refuses what would write outside the cache."""
        end = int(starts.max()) + length
        if end > self.max_seq or not 0 <= row < self.max_batch:
            raise BackendError(
                f"position {end - 1} of row {row} lies outside the KV cache "
                f"({self.max_batch} rows of {self.max_seq} positions); open the engine with more"
            )
        self._inputs.write(tokens, starts, length, end)

    def _run(self, binding: Any) -> None:
        if self._device == "cuda":
            binding.synchronize_inputs()
        begin = perf_counter()
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise BackendError(f"ONNX Runtime failed in a step of the model: {_first_line(error)}") from error
        finally:
            self.model_seconds += perf_counter() - begin

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
        self._logits.bind(binding, rows)
        return binding


def _open_session(ort: Any, bundle: Bundle, provider: str, threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    if provider == CUDA:
        ort.preload_dlls()
    try:
        session = ort.InferenceSession(str(bundle.graph_path), options, providers=[provider])
    except Exception as error:
        raise BackendError(f"ONNX Runtime cannot load {bundle.graph_path}: {_first_line(error)}") from error
    if session.get_providers()[0] != provider:
        raise BackendError(
            f"{provider} did not start on this machine; see `starling doctor`, or use --backend onnxruntime-cpu"
        )
    return session


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _allocate_cache(ort: Any, bundle: Bundle, device: str, rows: int, positions: int) -> dict[str, Any]:
    """OrtValues "{layer}.key" and "{layer}.value", each [max_batch, kv_heads, max_seq, head_dim]."""
    shape = [rows, bundle.architecture.kv_heads, positions, bundle.architecture.head_dim]
    kind = bundle.kv_cache.dtype

    def allocate() -> Any:
        if device == "cpu":  # zeroed pages cost no memory until a token is written to them
            return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.zeros(shape, HOST_TYPES[kind]), ONNX_TYPES[kind])
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, ONNX_TYPES[kind], device, 0)

    try:
        return {f"{i}.{side}": allocate() for i in range(bundle.architecture.layers) for side in ("key", "value")}
    except Exception as error:  # MemoryError from NumPy, an exception of ONNX Runtime's own from a GPU
        raise BackendError(
            f"no memory for a KV cache of {rows} row(s) of {positions} positions; lower --max-seq: {_first_line(error)}"
        ) from error


class _Input:
    """A small input of the graph: `host` is written at every step, and the graph reads `value` on its device."""

    def __init__(self, ort: Any, kind: str, size: int, device: str) -> None:
        self.kind, self.device = ONNX_TYPES[kind], device
        self.host = np.zeros(size, kind)
        # On the CPU the OrtValue is the NumPy array's own memory, so writing `host` is all there is to do.
        self.value = ort.OrtValue.ortvalue_from_numpy(self.host, device, 0)

    def push(self) -> None:
        """Copy `host` to the device."""
        self.value.update_inplace(self.host)


class _StepInputs:
    """Token and length inputs of the graph, in buffers that are allocated once and updated in place."""

    def __init__(self, ort: Any, dialect: str, device: str, rows: int, chunk: int) -> None:
        self._device = device
        tokens = max(rows, chunk)
        self._per_token = {"input_ids": _Input(ort, "int64", tokens, device)}
        if dialect == "ort":
            self._per_row = {"seqlens_k": _Input(ort, "int32", rows, device)}
            # GroupQueryAttention reads this one on the host, whatever the device.
            self._total: _Input | None = _Input(ort, "int32", 1, "cpu")
        else:
            self._per_token["position_ids"] = _Input(ort, "int64", tokens, device)
            self._per_row = {name: _Input(ort, "int64", rows, device) for name in ("write_indices", "nonpad_kv_seqlen")}
            self._total = None
        self._all = [*self._per_token.values(), *self._per_row.values()]

    def bind(self, binding: Any, rows: int, length: int) -> None:
        """Bind the buffers' beginnings as inputs for `rows` rows of `length` tokens."""
        shaped = [(name, buffer, [rows, length]) for name, buffer in self._per_token.items()]
        shaped += [(name, buffer, [rows]) for name, buffer in self._per_row.items()]
        if self._total is not None:
            shaped.append(("total_sequence_length", self._total, []))
        for name, buffer, shape in shaped:
            binding.bind_input(name, buffer.device, 0, buffer.kind, shape, buffer.value.data_ptr())

    def write(self, tokens: Tokens, starts: Tokens, length: int, end: int) -> None:
        """Row i gets its `length` of `tokens` [rows * length] at starts[i]; `end` is the longest row's new length."""
        rows = len(starts)
        self._per_token["input_ids"].host[: len(tokens)] = tokens
        if self._total is not None:
            # By the operator's definition: the length of the row after this step, minus 1.
            self._per_row["seqlens_k"].host[:rows] = starts + (length - 1)
            self._total.host[0] = end
        else:
            self._per_token["position_ids"].host[: len(tokens)] = (starts[:, None] + np.arange(length)).ravel()
            self._per_row["write_indices"].host[:rows] = starts
            self._per_row["nonpad_kv_seqlen"].host[:rows] = starts + length
        if self._device != "cpu":
            for buffer in self._all:
                buffer.push()


class _LogitsBuffer:
    """Logits [max_batch, 1, vocab] in host memory (ONNX Runtime copies them there from a GPU), read as float32."""

    def __init__(self, bundle: Bundle, rows: int) -> None:
        kind = next((spec.dtype for spec in bundle.graph.outputs if spec.name == "logits"), "")
        if kind not in HOST_TYPES:
            raise BackendError(f"{bundle.folder}: the graph has no logits output of a known type; export it again")
        self._kind = kind
        self._raw = np.zeros((rows, bundle.architecture.vocab_size), HOST_TYPES[kind])
        self._float32 = self._raw if kind == "float32" else np.zeros(self._raw.shape, np.float32)

    def bind(self, binding: Any, rows: int) -> None:
        """Bind the first `rows` rows as the graph's output."""
        shape = [rows, 1, self._raw.shape[1]]
        binding.bind_output("logits", "cpu", 0, ONNX_TYPES[self._kind], shape, self._raw.ctypes.data)

    def read(self, rows: int) -> Logits:
        """The first `rows` rows as float32 [rows, vocab]."""
        out = self._float32[:rows]
        if self._kind == "float16":
            np.take(FLOAT16_VALUES, self._raw[:rows], out=out, mode="clip")
        elif self._kind == "bfloat16":  # bf16 is the upper half of a float32's bits
            np.left_shift(self._raw[:rows], 16, out=out.view(np.uint32), dtype=np.uint32)
        return out
