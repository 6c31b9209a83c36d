"""Runs of a session on a GPU: where in device memory each finds its tokens and its rows of the KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from starling.engine.backends.cuda.cuda_device import address_of
from starling.engine.backends.cuda.device_memory import DeviceMemory
from starling.engine.backends.cuda.launched_steps import TOKEN_BYTES
from starling.engine.backends.cuda.step_tensors import ITEM_BYTES, KVCache
from starling.engine.backends.onnxruntime.step_buffers import ONNX_TYPES, failed_run
from starling.engine.bundle.manifest import Bundle
from starling.engine.names import LOGITS_TO_KEEP, NEXT_SEQLENS, NEXT_TOKENS

LENGTH_BYTES = 4
#: The name of no CUDA graph.
_UNCAPTURED = -1


@dataclass(frozen=True, slots=True)
class RunTensors:
    """Device addresses of what a run of up to so many tokens reads and writes beside the cache."""

    ids: int
    lengths: int
    logits: int
    next_tokens: int
    next_lengths: int


class DeviceRuns:
    """A session of ONNX Runtime with the KV cache that it runs on; all is bound by address, nothing by value."""

    def __init__(self, ort: Any, session: Any, memory: DeviceMemory, bundle: Bundle) -> None:
        """Nothing is allocated yet: `close` must come before the memory's, whatever `allocate` raises."""
        self.session: Any = session
        self._ort, self._memory, self._bundle = ort, memory, bundle
        self._kind, self._vocab_size = bundle.kv_cache.dtype, bundle.architecture.vocab_size
        self._row_bindings: dict[int, Any] = {}
        self.uncaptured = self.options(_UNCAPTURED)

    def allocate(self, rows: int, positions: int, most_kept: int) -> None:
        """The cache, and what runs of a row need on the host; logits are given for `most_kept` tokens at most."""
        memory, layers = self._memory, self._bundle.architecture.layers
        pairs = [
            (f"past_key_values.{layer}.{side}", f"present.{layer}.{side}")
            for layer in range(layers)
            for side in ("key", "value")
        ]
        self.cache = KVCache(memory, self._bundle, pairs, rows, positions)
        self._ends = memory.host((positions,), "int32")
        kept = memory.host((most_kept,), "int64")
        kept[:] = np.arange(-most_kept, 0)
        self._kept, self._most_kept = memory.allocate(kept.nbytes), most_kept
        memory.copy(self._kept, address_of(kept), kept.nbytes)
        # GroupQueryAttention reads these on the host: the longest row of a run, and for a decode step, whose CUDA graph
        # keeps its arguments, the longest that there can be. On an H200 that costs nothing.
        self._longest, self._any_length = np.zeros(1, np.int32), np.full(1, positions, np.int32)

    def tensors(self, tokens: int, rows: int, *, feeds_itself: bool) -> RunTensors:
        """Room for a run of `tokens` tokens in all that gives logits for `rows` of them.

        What feeds itself writes its choice, and the lengths after it, where the next run reads them.
        """
        allocate = self._memory.allocate
        ids, lengths = allocate(tokens * TOKEN_BYTES), allocate(rows * LENGTH_BYTES)
        logits = allocate(rows * self._vocab_size * ITEM_BYTES[self._kind])
        if feeds_itself:
            return RunTensors(ids, lengths, logits, ids, lengths)
        return RunTensors(ids, lengths, logits, allocate(rows * TOKEN_BYTES), allocate(rows * LENGTH_BYTES))

    def options(self, graph: int) -> Any:
        """How to run: `graph` names the CUDA graph that ONNX Runtime makes of it, and from then on replays."""
        options = self._ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph))
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return options

    def step_binding(self, tensors: RunTensors, rows: int) -> Any:
        """A binding of one token for each of the first rows, which a CUDA graph may keep."""
        binding = self.session.io_binding()
        self._bind_cache(binding, 0, rows)
        self._bind(binding, tensors, (rows, 1), 1, self._any_length)
        return binding

    def run_row(self, row: int, tensors: RunTensors, length: int, kept: int, end: int) -> None:
        """Run `length` tokens of one row, up to position `end`, with logits for the last `kept` of them."""
        self._ends[end - 1] = end - 1
        self._memory.copy(tensors.lengths, address_of(self._ends[end - 1 :]), LENGTH_BYTES)
        self._longest[0] = end
        binding = self._row_bindings.get(row)
        if binding is None:
            binding = self._row_bindings[row] = self.session.io_binding()
            self._bind_cache(binding, row, 1)
        self._bind(binding, tensors, (1, length), kept, self._longest)
        self.run(binding, self.uncaptured)

    def run(self, binding: Any, options: Any) -> None:
        """Put a run on the stream. Raises BackendError."""
        try:
            self.session.run_with_iobinding(binding, options)
        except Exception as error:
            raise failed_run(error) from error

    def close(self) -> None:
        """Free the session, before the stream that it runs on."""
        self._row_bindings.clear()
        self.session = None

    def _bind_cache(self, binding: Any, first: int, rows: int) -> None:
        """Past and present are the same memory: rows first..first+rows of the cache."""
        shape, kind = [rows, *self.cache.row_shape], ONNX_TYPES[self._kind]
        for past, present, address in self.cache.rows_from(first):
            binding.bind_input(past, "cuda", 0, kind, shape, address)
            binding.bind_output(present, "cuda", 0, kind, shape, address)

    def _bind(
        self, binding: Any, tensors: RunTensors, shape: tuple[int, int], kept: int, longest: npt.NDArray[np.int32]
    ) -> None:
        """Bind the buffers' beginnings for [rows, length] tokens with logits for the last `kept` of each row."""
        rows, where, of = shape[0], "cuda", ONNX_TYPES
        skipped = self._kept + (self._most_kept - kept) * TOKEN_BYTES
        binding.bind_input("input_ids", where, 0, of["int64"], list(shape), tensors.ids)
        binding.bind_input("seqlens_k", where, 0, of["int32"], [rows], tensors.lengths)
        binding.bind_input("total_sequence_length", "cpu", 0, of["int32"], [], longest.ctypes.data)
        binding.bind_input(LOGITS_TO_KEEP, where, 0, of["int64"], [kept], skipped)
        binding.bind_output("logits", where, 0, of[self._kind], [rows, kept, self._vocab_size], tensors.logits)
        binding.bind_output(NEXT_TOKENS, where, 0, of["int64"], [rows, kept], tensors.next_tokens)
        binding.bind_output(NEXT_SEQLENS, where, 0, of["int32"], [rows], tensors.next_lengths)
