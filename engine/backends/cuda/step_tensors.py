"""The graph's inputs and outputs in device memory: the KV cache, and what a step reads and writes beside it."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence

from starling.engine.backends.cuda.cuda_device import ALIGNMENT
from starling.engine.backends.cuda.device_memory import DeviceMemory
from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import BackendError
from starling.engine.names import (
    INPUT_IDS,
    LOGITS,
    NEXT_LENGTHS,
    NEXT_TOKENS,
    NOISE,
    PAST_LENGTHS,
    TEMPERATURE,
    TOP_K,
    TOP_P,
)

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4}
#: What tells the graph how to choose a row's token; each has one entry per row, `noise` one per position as well.
CHOICE_INPUTS = (TEMPERATURE, TOP_K, TOP_P, NOISE)


class KVCache:
    """Keys and values of every layer, each [rows, kv_heads, positions, head_dim], which is past and present at once."""

    def __init__(
        self, memory: DeviceMemory, bundle: Bundle, aliases: Sequence[tuple[str, str]], rows: int, positions: int
    ) -> None:
        self.row_shape = (bundle.architecture.kv_heads, positions, bundle.architecture.head_dim)
        self._row_bytes = math.prod(self.row_shape) * ITEM_BYTES[bundle.kv_cache.dtype]
        if rows > 1 and self._row_bytes % ALIGNMENT:
            raise BackendError(
                f"a row of the KV cache takes {self._row_bytes} bytes, no multiple of {ALIGNMENT}, so that no row but "
                f"the first can be prefilled; build the plan with a --max-seq that is a multiple of 64, not {positions}"
            )
        # Zeroed by the allocation: masked positions still enter a product with 0, which leaves NaN what it is.
        self._pairs = [(past, present, memory.allocate(rows * self._row_bytes)) for past, present in aliases]
        self.bytes = len(self._pairs) * rows * self._row_bytes

    def rows_from(self, first: int) -> Iterator[tuple[str, str, int]]:
        """(past, present, address) of each tensor, beginning with row `first`."""
        for past, present, address in self._pairs:
            yield past, present, address + first * self._row_bytes

    def parts(self, row: int) -> Iterator[tuple[int, int]]:
        """(address, bytes) of everything that belongs to row `row`."""
        for _, _, address in self.rows_from(row):
            yield address, self._row_bytes


class RowTensors:
    """Tensors in device memory with so many bytes for each row, by name."""

    def __init__(self, memory: DeviceMemory, row_bytes: Mapping[str, int], rows: int) -> None:
        self.row_bytes = row_bytes
        self.addresses = {name: memory.allocate(rows * size) for name, size in row_bytes.items()}

    def row(self, name: str, row: int) -> int:
        """Address of one row of a tensor."""
        return self.addresses[name] + row * self.row_bytes[name]


class StepTensors(RowTensors):
    """What a step of up to `rows` rows of `length` tokens reads and writes beside the cache, by name."""

    def __init__(
        self,
        memory: DeviceMemory,
        bundle: Bundle,
        logits_dtype: str,
        *,
        names: Container[str],
        rows: int,
        length: int,
        positions: int,
    ) -> None:
        """Those of `names` that are beside the cache: a plan that draws no tokens has no inputs for that."""
        self._positions = positions
        every = {
            INPUT_IDS: 8 * length,
            PAST_LENGTHS: 8,
            TEMPERATURE: 4,
            TOP_K: 8,
            TOP_P: 4,
            NOISE: 4 * positions,
            LOGITS: ITEM_BYTES[logits_dtype] * bundle.architecture.vocab_size,
            NEXT_TOKENS: 8,
            NEXT_LENGTHS: 8,
        }
        super().__init__(memory, {name: size for name, size in every.items() if name in names}, rows)

    def input_shapes(self, rows: int, length: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the inputs in a step of `rows` rows of `length` tokens."""
        shapes: dict[str, tuple[int, ...]] = {
            INPUT_IDS: (rows, length),
            PAST_LENGTHS: (rows,),
            TEMPERATURE: (rows,),
            TOP_K: (rows,),
            TOP_P: (rows,),
            NOISE: (rows, self._positions),
        }
        return {name: shape for name, shape in shapes.items() if name in self.addresses}
