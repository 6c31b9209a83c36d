"""The two kinds of step: a prefill of one row in chunks, and a decode of the first rows, one CUDA graph for each count.

Both leave the chosen token and the row's new length where the next decode step reads them, so it needs no host.
"""

from __future__ import annotations

from starling.engine.backends.backend import Tokens
from starling.engine.backends.cuda.cuda_device import address_of
from starling.engine.backends.cuda.device_memory import DeviceMemory
from starling.engine.backends.cuda.launched_steps import TOKEN_BYTES
from starling.engine.backends.cuda.step_tensors import CHOICE_INPUTS, KVCache, StepTensors
from starling.engine.backends.tensorrt.run.execution import ExecutionContext
from starling.engine.names import INPUT_IDS, NEXT_LENGTHS, NEXT_TOKENS, PAST_LENGTHS


class PrefillStep:
    """Runs of one row, by the addresses of its part of the cache."""

    def __init__(
        self,
        context: ExecutionContext,
        memory: DeviceMemory,
        cache: KVCache,
        chunk: StepTensors,
        batch: StepTensors,
        *,
        positions: int,
        chunk_length: int,
    ) -> None:
        self._context, self._memory, self._cache = context, memory, cache
        self._chunk, self._batch, self._chunk_length = chunk, batch, chunk_length
        self._row = -1
        self._prompt = memory.host((positions,), "int64")
        self._start = memory.host((1,), "int64")
        context.set_addresses(chunk.addresses)
        context.set_shapes({past: (1, *cache.row_shape) for past, _, _ in cache.rows_from(0)})

    def enqueue(self, row: int, tokens: Tokens, start: int) -> None:
        """Put the prefill of `tokens` int64 [n] at start..start+n of row `row` on the stream, which must be idle."""
        copy, chunk = self._memory.copy, self._chunk
        self._select(row)
        self._prompt[: len(tokens)] = tokens
        self._start[0] = start
        copy(chunk.addresses[PAST_LENGTHS], address_of(self._start), TOKEN_BYTES)
        for first in range(0, len(tokens), self._chunk_length):
            length = min(self._chunk_length, len(tokens) - first)
            source = address_of(self._prompt) + first * TOKEN_BYTES
            copy(chunk.addresses[INPUT_IDS], source, length * TOKEN_BYTES)
            self._context.set_shapes(chunk.input_shapes(1, length))
            self._context.enqueue()
            copy(chunk.addresses[PAST_LENGTHS], chunk.addresses[NEXT_LENGTHS], TOKEN_BYTES)
        copy(self._batch.row(INPUT_IDS, row), chunk.addresses[NEXT_TOKENS], TOKEN_BYTES)
        copy(self._batch.row(PAST_LENGTHS, row), chunk.addresses[NEXT_LENGTHS], TOKEN_BYTES)

    def _select(self, row: int) -> None:
        for name in CHOICE_INPUTS:
            if name in self._chunk.addresses:
                self._memory.copy(self._chunk.addresses[name], self._batch.row(name, row), self._chunk.row_bytes[name])
        if row != self._row:
            for past, present, address in self._cache.rows_from(row):
                self._context.set_addresses({past: address, present: address})
            self._row = row


class DecodeStep:
    """One token for each of the first `rows` rows, from and to the same buffers."""

    def __init__(
        self, context: ExecutionContext, memory: DeviceMemory, cache: KVCache, batch: StepTensors, rows: int
    ) -> None:
        """`context` must be the step's own: TensorRT ties what a graph recorded to its context's shapes.

        The step is run here once, on what the buffers hold, so that its kernels are compiled when it is captured.
        """
        self._memory, self._batch, self._bytes = memory, batch, rows * TOKEN_BYTES
        self._context = context
        self._context.set_shapes(batch.input_shapes(rows, 1))
        self._context.set_shapes({past: (rows, *cache.row_shape) for past, _, _ in cache.rows_from(0)})
        self._context.set_addresses(batch.addresses)
        for past, present, address in cache.rows_from(0):
            self._context.set_addresses({past: address, present: address})
        self._context.check_complete()
        self._context.enqueue()
        memory.synchronize()
        self._graph = memory.capture(self._enqueue) if self._context.can_be_captured else None

    def launch(self) -> None:
        """Put the step on the stream."""
        if self._graph is None:
            self._enqueue()
        else:
            self._memory.device.launch(self._graph, self._memory.stream)

    def _enqueue(self) -> None:
        addresses, copy = self._batch.addresses, self._memory.copy
        self._context.enqueue()
        copy(addresses[INPUT_IDS], addresses[NEXT_TOKENS], self._bytes)
        copy(addresses[PAST_LENGTHS], addresses[NEXT_LENGTHS], self._bytes)
