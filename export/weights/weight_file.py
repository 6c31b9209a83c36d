"""Stream the planned weights of a graph into one external data file, one tensor at a time."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from os import SEEK_CUR
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir
import torch
from torch import Tensor

from starling.engine.errors import UnsupportedModelError
from starling.engine.progress import Advance
from starling.export.checkpoints.checkpoint import TensorSource
from starling.export.quantization.block_plan import BlockPlan
from starling.export.quantization.block_store import BlockStore
from starling.export.quantization.blocks import BlockQuantization, QuantizedRows, quantize_rows
from starling.export.quantization.qdq_scheme import FP8, INT4, INT8, Grid, pack_int4, quantize_weight, weight_scales
from starling.export.quantization.stored_blocks import StoredBlocks
from starling.export.weights.weight_plan import (
    Blocks,
    ExpertBlocks,
    ExpertRows,
    QdqRows,
    Rows,
    Table,
    Weight,
    weight_of,
)

ALIGNMENT = 4096  # a tensor starts on a page, so that a reader can map it
ROW_MULTIPLE = 64  # rows of zeros follow a quantized weight up to such a number: kernels of GPUs ask for it
CHUNK_ELEMENTS = 8 * 1024 * 1024  # rows are read in pieces of this size: 32 MiB as float32

_TORCH = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.INT8: torch.int8,
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
}
_GRIDS = {grid.stored: grid for grid in (INT8, INT4, FP8)}


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """Size in bytes and SHA-256 of a file, taken while it was written."""

    bytes: int
    sha256: str


def planned_bytes(model: ir.Model) -> int:
    """Bytes of all planned weights, each counted once."""
    return sum(_size(value) for value in _distinct(model).values())


def bytes_per_token(model: ir.Model) -> int:
    """Weight bytes that one decoded token reads: all but rotary tables and an embedding that nothing else reads.

    Of a mixture's experts it reads those that it chose.
    """
    read: dict[Weight, int] = {}
    for value in model.graph.initializers.values():
        weight = weight_of(value)
        looked_up = all(node.op_type in ("Gather", "GatherBlockQuantized") for node in _readers(value))
        if weight is not None and not isinstance(weight, Table) and not looked_up:
            read[weight] = int(_size(value) * _share(value))
    return sum(read.values())


def bits_per_weight(model: ir.Model, tensors: TensorSource) -> float:
    """Bits of a weight in blocks, scales and zero points among them; the mean over all such weights."""
    stored, weights = 0, 0
    for weight, value in _distinct(model).items():
        if isinstance(weight, Blocks | ExpertBlocks):
            stored += _size(value)
            names = weight.rows.names if isinstance(weight, Blocks) else (weight.rows.name,)
            weights += sum(math.prod(tensors.shape(name)) for name in names) if weight.piece == "data" else 0
    return round(8 * stored / max(weights, 1), 3)


def _share(value: ir.Value) -> float:
    """The share of a weight that one token reads: of experts the chosen ones, else all of it."""
    users = [node for node in _readers(value) if node.op_type in ("MoE", "QMoE")]
    return users[0].attributes["k"].as_int() / int(_shape(value).numpy()[0]) if users else 1.0


def _readers(value: ir.Value) -> list[ir.Node]:
    """What reads a weight, be it in another type."""
    nodes = [use.node for use in value.uses()]
    return [reader for node in nodes for reader in (_readers(node.outputs[0]) if node.op_type == "Cast" else [node])]


def write_weights(
    model: ir.Model,
    tensors: TensorSource,
    file: Path,
    plan: BlockPlan | None,
    store: BlockStore | None = None,
    progress: Advance | None = None,
    stored: StoredBlocks | None = None,
) -> WrittenFile:
    """Write every planned weight to `file` and point the graph's initializers at it.

    What is to be in blocks, as `plan` says, is taken from `store`, or as it is `stored`; what neither has is rounded.

    Memory taken: the largest stored tensor and one chunk. `progress(bytes_done, bytes_total)` is called as it goes.
    Where `tensors` gives shapes alone (on PyTorch's meta device), the file has its size and holes in their place.

    Raises:
        CheckpointError: the checkpoint was cut off or changed since it was opened.
        UnsupportedModelError: a weight is too large for the type it is stored in.
    """
    distinct = _distinct(model)
    total = planned_bytes(model)
    places: dict[Weight, tuple[int, int]] = {}
    with file.open("wb") as out:
        writer = _Writer(out, total, progress)
        for rows in _quantized_rows(distinct):
            assert plan is not None
            dtype = _TORCH[_dtype(distinct[Blocks(rows, "scales")])]
            pieces = _block_pieces(tensors, rows, plan.of(rows.names), store, stored)
            _write_blocks(writer, pieces, rows, dtype, places)
        for weight, value in distinct.items():
            if isinstance(weight, QdqRows) and weight.piece == "data":
                scales = distinct[QdqRows(weight.rows, "scales", weight.block)]
                _write_qdq(writer, tensors, weight, _GRIDS[_dtype(value)], _TORCH[_dtype(scales)], places)
            if isinstance(weight, ExpertBlocks) and weight.piece == "data":
                assert plan is not None
                dtype = _TORCH[_dtype(distinct[ExpertBlocks(weight.rows, "scales")])]
                experts = _expert_pieces(tensors, weight.rows, plan.how, store)
                _write_expert_blocks(writer, experts, weight.rows, dtype, places)
            if isinstance(weight, ExpertRows):
                places[weight] = _write_experts(writer, tensors, weight, _TORCH[_dtype(value)])
            if not isinstance(weight, Rows | Table):
                continue
            start = writer.begin()
            tensor = _assemble(weight, tensors, value)
            writer.write(tensor)
            places[weight] = (start, writer.position - start)
        out.truncate(writer.position)
    for value in model.graph.initializers.values():
        if (planned := weight_of(value)) is not None:
            offset, length = places[planned]
            value.const_value = ir.ExternalTensor(
                file.name,
                offset,
                length,
                _dtype(value),
                shape=_shape(value),
                name=str(value.name),
                base_dir=file.parent,
            )
    return WrittenFile(writer.position, writer.digest.hexdigest())


class _Writer:
    """Appends tensors, keeps the digest, and reports progress."""

    def __init__(self, out: BinaryIO, total: int, progress: Advance | None) -> None:
        self.out, self.total, self.progress = out, total, progress
        self.digest, self.position, self.done = hashlib.sha256(), 0, 0

    def begin(self) -> int:
        """Pad to the next aligned offset and return it."""
        self.pad(-self.position % ALIGNMENT)
        return self.position

    def pad(self, size: int) -> None:
        """Append so many zero bytes."""
        self._append(bytes(size))

    def write(self, tensor: Tensor) -> None:
        """Append the tensor's bytes; a hole where it has none."""
        if tensor.is_meta:
            self.out.seek(tensor.nbytes, SEEK_CUR)
            self.position += tensor.nbytes
            return
        flat = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        step = 32 * 1024 * 1024
        for start in range(0, flat.size, step):
            piece = flat[start : start + step]
            self._append(piece.data)
            self.done += piece.size
            if self.progress is not None:
                self.progress(self.done, self.total)

    def _append(self, data: bytes | memoryview) -> None:
        self.out.write(data)
        self.digest.update(data)
        self.position += len(data)


def _distinct(model: ir.Model) -> dict[Weight, ir.Value]:
    """One initializer per different weight, in graph order: what is tied is written once."""
    found: dict[Weight, ir.Value] = {}
    for value in model.graph.initializers.values():
        if (weight := weight_of(value)) is not None:
            found.setdefault(weight, value)
    return found


def _quantized_rows(distinct: dict[Weight, ir.Value]) -> list[Rows]:
    return list(dict.fromkeys(w.rows for w in distinct if isinstance(w, Blocks)))


def _chunks(tensors: TensorSource, name: str) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of a checkpoint tensor, piece by piece."""
    for start, stop in _ranges(tensors.shape(name)):
        yield start, tensors.rows(name, start, stop)


def _ranges(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """The first row and the one after the last of each piece."""
    count, *rest = shape
    step = max(1, CHUNK_ELEMENTS // math.prod(rest))
    return ((start, min(start + step, count)) for start in range(0, count, step))


def _assemble(weight: Rows | Table, tensors: TensorSource, value: ir.Value) -> Tensor:
    """The whole tensor as it is stored."""
    dtype = _TORCH[_dtype(value)]
    if isinstance(weight, Table):
        return weight.values.to(dtype)
    if not tensors.shape(weight.names[0]):  # a single number has no rows
        return _narrow(tensors.rows(weight.names[0], 0, 1).reshape(()), dtype, weight.names[0])
    device = tensors.rows(weight.names[0], 0, 0).device
    stored = torch.empty([int(d) for d in _shape(value).numpy()], dtype=dtype, device=device)
    by_row = stored.T if weight.transposed else stored
    first = 0
    for name in weight.names:
        for start, rows in _chunks(tensors, name):
            rows = rows.float() + weight.plus if weight.plus else rows
            by_row[first + start : first + start + len(rows)] = _narrow(rows, dtype, name)
        first += tensors.shape(name)[0]
    return stored


def _narrow(rows: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    narrowed = rows.to(dtype)
    if rows.is_meta:
        return narrowed
    if dtype is torch.float16 and rows.dtype is not torch.float16 and not bool(narrowed.isfinite().all()):
        largest = f"{rows.abs().max():.3g}"
        raise UnsupportedModelError(
            f"{name} holds values that float16 cannot (largest {largest}); export with --dtype bf16 or fp32"
        )
    return narrowed


def _block_pieces(
    tensors: TensorSource,
    rows: Rows,
    how: BlockQuantization,
    store: BlockStore | None,
    stored: StoredBlocks | None,
) -> Iterator[tuple[str, QuantizedRows]]:
    """(tensor, some of its rows), as they come."""
    for name in rows.names:
        known = None if store is None else store.take(name)
        if known is not None:
            yield name, known
            continue
        if stored is not None and name in stored.grids:
            yield from ((name, stored.rows(name, start, stop, how)) for start, stop in _ranges(tensors.shape(name)))
            continue
        for _, piece in _chunks(tensors, name):
            yield name, quantize_rows(piece, how)


def _write_blocks(
    writer: _Writer,
    quantized: Iterator[tuple[str, QuantizedRows]],
    rows: Rows,
    dtype: torch.dtype,
    places: dict[Weight, tuple[int, int]],
) -> None:
    """Write the data as the rows come; scales and zero points are small and follow."""
    start, count, row_bytes = writer.begin(), 0, 0
    small: dict[str, list[Tensor]] = {"scales": [], "zero_points": []}
    for name, piece in quantized:
        writer.write(piece.data)
        count, row_bytes = count + len(piece.data), piece.data[0].nbytes
        small["scales"].append(_narrow(piece.scales, dtype, name))
        small["zero_points"].append(piece.zeros)
    missing = -count % ROW_MULTIPLE
    places[Blocks(rows, "data")] = (start, writer.position - start)
    writer.pad(missing * row_bytes)
    for piece_name, pieces in small.items():
        start = writer.begin()
        writer.write(torch.cat(pieces))
        places[Blocks(rows, piece_name)] = (start, writer.position - start)
        writer.pad(missing * pieces[0][0].nbytes)


def _experts(tensors: TensorSource, rows: ExpertRows) -> Iterator[Tensor]:
    """Each expert's matrix [rows, columns] (or bias [rows]) as it is stored."""
    for expert in range(tensors.shape(rows.name)[0]):
        matrix = tensors.rows(rows.name, expert, expert + 1)[0]
        yield _in_turns(matrix.T if rows.transposed else matrix, rows).contiguous()


def _in_turns(matrix: Tensor, rows: ExpertRows) -> Tensor:
    """Its first and second half of rows in turns, where they are stored so."""
    return torch.stack(matrix.chunk(2), dim=1).flatten(0, 1) if rows.interleave else matrix


def _expert_pieces(
    tensors: TensorSource, rows: ExpertRows, how: BlockQuantization, store: BlockStore | None
) -> Iterator[QuantizedRows]:
    """Each expert's matrix."""
    for expert, matrix in enumerate(_experts(tensors, rows)):
        known = None if store is None else store.take(rows.name, expert)
        if known is None:
            yield quantize_rows(matrix, how)
        else:
            yield QuantizedRows(*(_in_turns(piece, rows) for piece in known))


def _write_experts(writer: _Writer, tensors: TensorSource, rows: ExpertRows, dtype: torch.dtype) -> tuple[int, int]:
    start = writer.begin()
    for matrix in _experts(tensors, rows):
        writer.write(_narrow(matrix, dtype, rows.name))
    return start, writer.position - start


def _write_expert_blocks(
    writer: _Writer,
    quantized: Iterator[QuantizedRows],
    rows: ExpertRows,
    dtype: torch.dtype,
    places: dict[Weight, tuple[int, int]],
) -> None:
    """Write one expert after the other; scales and zero points are small and follow."""
    start = writer.begin()
    small: dict[str, list[Tensor]] = {"scales": [], "zero_points": []}
    for piece in quantized:
        writer.write(piece.data)
        small["scales"].append(_narrow(piece.scales, dtype, rows.name))
        small["zero_points"].append(piece.zeros)
    places[ExpertBlocks(rows, "data")] = (start, writer.position - start)
    for piece_name, parts in small.items():
        start = writer.begin()
        writer.write(torch.stack(parts))
        places[ExpertBlocks(rows, piece_name)] = (start, writer.position - start)


def _write_qdq(
    writer: _Writer,
    tensors: TensorSource,
    weight: QdqRows,
    grid: Grid,
    dtype: torch.dtype,
    places: dict[Weight, tuple[int, int]],
) -> None:
    """Quantize rows as they come and write them as columns, then their scales [blocks, rows] (or [rows])."""
    names = weight.rows.names
    columns = tensors.shape(names[0])[1]
    stored = torch.empty(columns, sum(tensors.shape(name)[0] for name in names), dtype=grid.torch_dtype)
    scales, first = [], 0
    for name in names:
        for _, piece in _chunks(tensors, name):
            scale = weight_scales(piece, grid, weight.block, dtype)
            stored[:, first : first + len(piece)] = quantize_weight(piece, scale, grid).T
            scales.append(scale)
            first += len(piece)
    by_column = torch.cat(scales).T.contiguous()
    pieces = {
        "data": pack_int4(stored) if grid is INT4 else stored,
        "scales": by_column if weight.block is not None else by_column[0],
    }
    for piece_name, tensor in pieces.items():
        start = writer.begin()
        writer.write(tensor)
        places[QdqRows(weight.rows, piece_name, weight.block)] = (start, writer.position - start)


def _dtype(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None
    return value.dtype


def _shape(value: ir.Value) -> ir.Shape:
    assert value.shape is not None
    return value.shape


def _size(value: ir.Value) -> int:
    return math.ceil(torch.Size(_shape(value).numpy()).numel() * _dtype(value).itemsize)
