"""Scores and embeddings by ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from starling.engine.backends.backend import PREFILL_CHUNK
from starling.engine.backends.onnxruntime.cpu_session import CPU, open_cpu_session
from starling.engine.backends.onnxruntime.step_buffers import allocate_cache, failed_run
from starling.engine.backends.pooling_backend import Tokens, Vectors
from starling.engine.bundle.manifest import OUTPUT_OF, Bundle
from starling.engine.names import INPUT_IDS, LOGITS_TO_KEEP, PAST, PAST_LENGTHS, PRESENT, SEQLENS_K

Inputs = dict[str, npt.NDArray[Any]]


class OrtPooling:
    """Implements `starling.engine.backends.pooling_backend.PoolingBackend` with ONNX Runtime on the CPU."""

    name = "onnxruntime"
    provider = CPU
    run_tokens = PREFILL_CHUNK

    def __init__(self, bundle: Bundle, *, threads: int, max_seq: int, max_batch: int) -> None:
        """Load the bundle, which scores or embeds. Raises BackendError where ONNX Runtime refuses its graph."""
        opened = open_cpu_session(bundle, threads, takes_turns=True)
        self._ort, self._session, self._bundle = opened.ort, opened.session, bundle
        self.kernels, self.kernels_note = opened.kernels, opened.kernels_note
        self.max_seq, self.max_batch, self.width = max_seq, max_batch, bundle.output_width
        self.model_seconds = 0.0
        self.note: str | None = None
        self._output, self._inputs_of = OUTPUT_OF[bundle.task], _INPUTS[bundle.dialect]

    def new_cache(self, rows: int, positions: int) -> dict[str, Any]:
        """Keys and values of every layer, each [rows, kv_heads, positions, head_dim]."""
        return allocate_cache(self._ort, self._bundle, rows, positions)[0]

    def run(self, cache: dict[str, Any], tokens: Tokens, start: int, kept: Sequence[int]) -> Vectors:
        """Run the graph for the texts of `cache`; several rows only begin one, as GroupQueryAttention asks."""
        rows, length = tokens.shape
        binding = self._session.io_binding()
        for name, buffer in cache.items():
            kind, shape, pointer = buffer.element_type(), buffer.shape(), buffer.data_ptr()
            binding.bind_input(f"{PAST}{name}", "cpu", 0, kind, shape, pointer)
            binding.bind_output(f"{PRESENT}{name}", "cpu", 0, kind, shape, pointer)
        inputs = self._inputs_of(rows, start, start + length)
        inputs |= {INPUT_IDS: np.ascontiguousarray(tokens), LOGITS_TO_KEEP: np.array(kept, np.int64)}
        for name, values in inputs.items():
            binding.bind_cpu_input(name, values)
        binding.bind_output(self._output, "cpu")
        begin = perf_counter()
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise failed_run(error) from error
        finally:
            self.model_seconds += perf_counter() - begin
        found: Vectors = binding.get_outputs()[-1].numpy()  # in the order in which they were bound
        return found

    def close(self) -> None:
        """Free the session."""
        self._session = None


# What a graph wants to know of a run of `rows` rows that writes positions start..end.


def _ort_inputs(rows: int, start: int, end: int) -> Inputs:
    return {SEQLENS_K: np.full(rows, end - 1, np.int32), "total_sequence_length": np.array(end, np.int32)}


def _canonical_inputs(rows: int, start: int, end: int) -> Inputs:
    return {
        "position_ids": np.tile(np.arange(start, end, dtype=np.int64), (rows, 1)),
        "write_indices": np.full(rows, start, np.int64),
        "nonpad_kv_seqlen": np.full(rows, end, np.int64),
    }


def _tensorrt_inputs(rows: int, start: int, end: int) -> Inputs:
    return {PAST_LENGTHS: np.full(rows, start, np.int64)}


_INPUTS: dict[str, Callable[[int, int, int], Inputs]] = {
    "ort": _ort_inputs,
    "canonical": _canonical_inputs,
    "tensorrt": _tensorrt_inputs,
}
