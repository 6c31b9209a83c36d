"""Where planned weights come from: the checkpoint's tensors, piece by piece, narrowed or quantized for the file."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from starling.engine.errors import UnsupportedModelError
from starling.export.checkpoints.checkpoint import TensorSource
from starling.export.quantization.block_plan import BlockPlan
from starling.export.quantization.block_store import BlockStore
from starling.export.quantization.blocks import QuantizedRows, quantize_rows
from starling.export.quantization.qdq_scheme import INT4, Grid, pack_int4, quantize_weight, weight_scales
from starling.export.quantization.stored_blocks import StoredBlocks
from starling.export.weights.weight_plan import ExpertRows, QdqRows, Rows, Table, shape_of

CHUNK_ELEMENTS = 8 * 1024 * 1024  # rows are read in pieces of this size: 32 MiB as float32


@dataclass(frozen=True, slots=True)
class WeightSource:
    """The checkpoint's `tensors`, and what is to be in blocks, as `plan` says.

    That is taken from `store`, where it was calibrated, or as it is `stored`; what neither has is rounded.
    """

    tensors: TensorSource
    plan: BlockPlan | None
    store: BlockStore | None = None
    stored: StoredBlocks | None = None

    def whole(self, weight: Rows | Table, value: ir.Value, dtype: torch.dtype) -> Tensor:
        """A weight in full precision, as `value` has it."""
        if isinstance(weight, Table):
            return weight.values.to(dtype)
        tensors = self.tensors
        if not tensors.shape(weight.names[0]):  # a single number has no rows
            return narrowed(tensors.rows(weight.names[0], 0, 1).reshape(()), dtype, weight.names[0])
        device = tensors.rows(weight.names[0], 0, 0).device
        stored = torch.empty([int(d) for d in shape_of(value).numpy()], dtype=dtype, device=device)
        by_row = stored.T if weight.transposed else stored
        first = 0
        for name in weight.names:
            for start, rows in self._chunks(name):
                rows = rows.float() + weight.plus if weight.plus else rows
                by_row[first + start : first + start + len(rows)] = narrowed(rows, dtype, name)
            first += tensors.shape(name)[0]
        return stored

    def blocks(self, rows: Rows) -> Iterator[tuple[str, QuantizedRows]]:
        """(tensor, some of its rows), as they come."""
        assert self.plan is not None
        how = self.plan.of(rows.names)
        for name in rows.names:
            known = None if self.store is None else self.store.take(name)
            if known is not None:
                yield name, known
            elif self.stored is not None and name in self.stored.grids:
                for start, stop in self._ranges(name):
                    yield name, self.stored.rows(name, start, stop, how)
            else:
                for _, piece in self._chunks(name):
                    yield name, quantize_rows(piece, how)

    def experts(self, rows: ExpertRows) -> Iterator[Tensor]:
        """Each expert's matrix [rows, columns] (or bias [rows]) as it is stored."""
        for expert in range(self.tensors.shape(rows.name)[0]):
            matrix = self.tensors.rows(rows.name, expert, expert + 1)[0]
            yield _in_turns(matrix.T if rows.transposed else matrix, rows).contiguous()

    def expert_blocks(self, rows: ExpertRows) -> Iterator[tuple[str, QuantizedRows]]:
        """(tensor, one expert's matrix), expert after expert."""
        assert self.plan is not None
        for expert, matrix in enumerate(self.experts(rows)):
            known = None if self.store is None else self.store.take(rows.name, expert)
            if known is None:
                yield rows.name, quantize_rows(matrix, self.plan.how)
            else:
                yield rows.name, QuantizedRows(*(_in_turns(piece, rows) for piece in known))

    def qdq(self, weight: QdqRows, grid: Grid, dtype: torch.dtype) -> dict[str, Tensor]:
        """By piece: rows quantized as they come and stored as columns, and their scales [blocks, rows] (or [rows])."""
        names, shape = weight.rows.names, self.tensors.shape
        stored = torch.empty(shape(names[0])[1], sum(shape(name)[0] for name in names), dtype=grid.torch_dtype)
        scales, first = [], 0
        for name in names:
            for _, piece in self._chunks(name):
                scale = weight_scales(piece, grid, weight.block, dtype)
                stored[:, first : first + len(piece)] = quantize_weight(piece, scale, grid).T
                scales.append(scale)
                first += len(piece)
        by_column = torch.cat(scales).T.contiguous()
        return {
            "data": pack_int4(stored) if grid is INT4 else stored,
            "scales": by_column if weight.block is not None else by_column[0],
        }

    def _chunks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of a tensor, piece by piece."""
        for start, stop in self._ranges(name):
            yield start, self.tensors.rows(name, start, stop)

    def _ranges(self, name: str) -> Iterator[tuple[int, int]]:
        """The first row and the one after the last of each piece."""
        count, *rest = self.tensors.shape(name)
        step = max(1, CHUNK_ELEMENTS // math.prod(rest))
        return ((start, min(start + step, count)) for start in range(0, count, step))


def narrowed(rows: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Rows of the tensor `name` as `dtype`. Raises UnsupportedModelError where float16 cannot hold them."""
    stored = rows.to(dtype)
    if rows.is_meta:
        return stored
    if dtype is torch.float16 and rows.dtype is not torch.float16 and not bool(stored.isfinite().all()):
        largest = f"{rows.abs().max():.3g}"
        raise UnsupportedModelError(
            f"{name} holds values that float16 cannot (largest {largest}); export with --dtype bf16 or fp32"
        )
    return stored


def _in_turns(matrix: Tensor, rows: ExpertRows) -> Tensor:
    """Its first and second half of rows in turns, where they are stored so."""
    return torch.stack(matrix.chunk(2), dim=1).flatten(0, 1) if rows.interleave else matrix
