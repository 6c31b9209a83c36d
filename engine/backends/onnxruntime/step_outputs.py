"""Memory that the ONNX Runtime backend allocates once: KV cache, logits, the choice of the next token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from starling.engine.backends.logits import FINITE_TESTS, HOST_TYPES, LogitsReader, logits_reader
from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import BackendError
from starling.engine.names import NEXT_TOKENS

# TensorProto.DataType values, which IOBinding takes.
ONNX_TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "float16": 10, "bfloat16": 16}


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def allocate_cache(ort: Any, bundle: Bundle, rows: int, positions: int) -> dict[str, Any]:
    """OrtValues "{layer}.key" and "{layer}.value", each [max_batch, kv_heads, max_seq, head_dim]."""
    shape = [rows, bundle.architecture.kv_heads, positions, bundle.architecture.head_dim]
    kind = bundle.kv_cache.dtype

    def allocate() -> Any:  # zeroed pages cost no memory until a token is written to them
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.zeros(shape, HOST_TYPES[kind]), ONNX_TYPES[kind])

    try:
        return {f"{i}.{side}": allocate() for i in range(bundle.architecture.layers) for side in ("key", "value")}
    except MemoryError as error:
        raise BackendError(
            f"no memory for a KV cache of {rows} row(s) of {positions} positions; lower --max-seq or the number of "
            f"rows: {first_line(error)}"
        ) from error


@dataclass(slots=True, eq=False)
class OrtOutput:
    """Implements `starling.engine.backends.backend.StepOutput` over the buffers' first rows."""

    tokens: Callable[[], list[int]]
    logits: LogitsReader


class StepOutputs:
    """Logits [rows, vocab] and the greedy choice [rows] in host memory, where ONNX Runtime writes them.

    A row is a row of the batch, or one of the positions kept of a single one. A graph without a choice of its own gets
    one from the logits.
    """

    def __init__(self, bundle: Bundle, rows: int) -> None:
        kinds = {spec.name: spec.dtype for spec in bundle.graph.outputs}
        self._kind = kinds.get("logits", "")
        if self._kind not in HOST_TYPES:
            raise BackendError(f"{bundle.folder}: the graph has no logits output of a known type; export it again")
        self._raw = np.zeros((rows, bundle.architecture.vocab_size), HOST_TYPES[self._kind])
        self._float32 = self._raw if self._kind == "float32" else np.zeros(self._raw.shape, np.float32)
        self._tokens = np.zeros((rows, 1), np.int64)
        self._chosen_in_graph = NEXT_TOKENS in kinds

    def bind(self, binding: Any, rows: int, kept: int = 1) -> None:
        """Bind the first rows as the graph's outputs for `rows` rows of the batch, `kept` positions of each."""
        shape = [rows, kept, self._raw.shape[1]]
        binding.bind_output("logits", "cpu", 0, ONNX_TYPES[self._kind], shape, self._raw.ctypes.data)
        if self._chosen_in_graph:
            binding.bind_output(NEXT_TOKENS, "cpu", 0, ONNX_TYPES["int64"], [rows, kept], self._tokens.ctypes.data)

    def output(self, rows: int) -> OrtOutput:
        """What a step of the first `rows` rows leaves behind, made once.

        It reads through memoryviews: after a run of the model the caches are cold, and NumPy's paths are long.
        """
        logits = logits_reader(self._raw[:rows], self._float32[:rows], self._kind)
        values, vocab, is_finite = self._raw.reshape(-1).data, self._raw.shape[1], FINITE_TESTS[self._kind]
        in_graph = self._tokens.reshape(-1)[:rows].data
        likeliest: Callable[[], list[int]] = (
            in_graph.tolist if self._chosen_in_graph else lambda: logits().argmax(axis=-1).tolist()
        )

        def tokens() -> list[int]:
            chosen, start = likeliest(), 0
            for row, token in enumerate(chosen):
                if not is_finite(values[start + token]):
                    chosen[row] = -1
                start += vocab
            return chosen

        return OrtOutput(tokens, logits)
