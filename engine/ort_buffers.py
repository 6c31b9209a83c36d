"""Memory that the ONNX Runtime backend allocates once: KV cache, token and length inputs, logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from starling.engine.backend import Logits, Tokens
from starling.engine.bundle import Bundle
from starling.engine.errors import BackendError
from starling.engine.logits import HOST_TYPES, LogitsReader, logits_reader

#: The graph's output with the greedy choice; a sampled one is made from the logits, on the host.
NEXT_TOKENS = "next_tokens"

StepWriter: TypeAlias = Callable[[Tokens, Tokens, int], None]
ChoiceReader: TypeAlias = Callable[[Logits], list[int]]

# TensorProto.DataType values, which IOBinding takes.
ONNX_TYPES = {"float32": 1, "int32": 6, "int64": 7, "float16": 10, "bfloat16": 16}


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def allocate_cache(ort: Any, bundle: Bundle, device: str, rows: int, positions: int) -> dict[str, Any]:
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
            f"no memory for a KV cache of {rows} row(s) of {positions} positions; lower --max-seq: {first_line(error)}"
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


class StepInputs:
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
            self._positions = self._per_token["position_ids"].host
            self._starts = self._per_row["write_indices"].host
        self._ids = self._per_token["input_ids"].host
        self._lengths = self._per_row["seqlens_k" if dialect == "ort" else "nonpad_kv_seqlen"].host

    def bind(self, binding: Any, rows: int, length: int) -> None:
        """Bind the buffers' beginnings as inputs for `rows` rows of `length` tokens."""
        shaped = [(name, buffer, [rows, length]) for name, buffer in self._per_token.items()]
        shaped += [(name, buffer, [rows]) for name, buffer in self._per_row.items()]
        if self._total is not None:
            shaped.append(("total_sequence_length", self._total, []))
        for name, buffer, shape in shaped:
            binding.bind_input(name, buffer.device, 0, buffer.kind, shape, buffer.value.data_ptr())

    def write_chunk(self, tokens: Tokens, start: int) -> None:
        """One row: `tokens` [n] go to positions start..start+n."""
        end = start + len(tokens)
        self._ids[: len(tokens)] = tokens
        if self._total is not None:
            # By the operator's definition: the length of the row after this step, minus 1.
            self._lengths[0] = end - 1
            self._total.host[0] = end
        else:
            self._positions[: len(tokens)] = np.arange(start, end)
            self._starts[0] = start
            self._lengths[0] = end
        if self._device != "cpu":
            self._push()

    def step_writer(self, rows: int) -> StepWriter:
        """A function (tokens [rows], positions [rows], their greatest) that writes one decode step's inputs.

        It keeps the views that it writes through: behind a run of the model the caches are cold, and slicing anew
        costs 15 us a token.
        """
        ids, lengths, on_device = self._ids[:rows], self._lengths[:rows], self._device != "cpu"
        total = self._total.host if self._total is not None else None

        def write(tokens: Tokens, positions: Tokens, longest: int) -> None:
            ids[:] = tokens
            if total is not None:
                lengths[:] = positions  # again the row's length after this step, minus 1
                total[0] = longest + 1
            else:
                self._positions[:rows] = positions
                self._starts[:rows] = positions
                np.add(positions, 1, out=lengths)
            if on_device:
                self._push()

        return write

    def _push(self) -> None:
        for buffer in (*self._per_token.values(), *self._per_row.values()):
            buffer.push()


class ChoiceBuffer:
    """The graph's greedy choice, int64 [max_batch, 1]; where a graph has none, it is made from the logits."""

    def __init__(self, bundle: Bundle, rows: int) -> None:
        self._in_graph = any(spec.name == NEXT_TOKENS for spec in bundle.graph.outputs)
        self._tokens = np.zeros((rows, 1), np.int64)

    def bind(self, binding: Any, rows: int) -> None:
        """Bind the first `rows` rows as the graph's output."""
        if self._in_graph:
            pointer = self._tokens.ctypes.data
            binding.bind_output(NEXT_TOKENS, "cpu", 0, ONNX_TYPES["int64"], [rows, 1], pointer)

    def reader(self, rows: int) -> ChoiceReader:
        """A function (logits [rows, vocab]) that gives the token with the greatest logit of each row."""
        chosen = self._tokens[:rows, 0]
        if self._in_graph:
            return lambda _: chosen.tolist()
        return lambda logits: logits.argmax(axis=-1).tolist()


class LogitsBuffer:
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

    def reader(self, rows: int) -> LogitsReader:
        """A function that gives the first `rows` rows as float32 [rows, vocab], a view of this buffer."""
        return logits_reader(self._raw[:rows], self._float32[:rows], self._kind)
